"""The tree of chunks: what it finds, against a model that looks at everything, and what it weighs."""

from itertools import accumulate, pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from memory_growth import grown
from memory_tier_tools import common
from ragkv.kvstore import metrics as m
from ragkv.kvstore import prefix_tree
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.keys import TOKEN_BYTES, as_tokens, chain_key
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pages import rows
from ragkv.kvstore.prefix_tree import PrefixTree, descendants, origin, shared_tokens
from ragkv.policies import POLICIES, make_policy

SPACE = b"namespace of one"
QUICK = settings(max_examples=300, deadline=None)


def raw(*tokens):
    return as_tokens(tokens).tobytes()


def cut_chain(tokens, sizes, namespace=SPACE):
    """A chain cut into chunks of the given sizes, as far as the tokens go; the rest is its open tail."""
    chain = TokenChain(namespace, None)
    chain.tokens = as_tokens(tokens)
    key = namespace
    for start, end in pairwise([0, *accumulate(sizes)]):
        if end > len(tokens):
            break
        key = chain_key(key, chain.tokens[start:end].tobytes())
        chain.ends.append(end)
        chain.keys.append(key)
    return chain


def store(catalogue, chain, ready=()):
    """Enter the whole chunks of a chain; the i-th stays unready where `ready` says so. Returns the chunks."""
    parent, chunks = catalogue.root(SPACE), []
    for index, ((start, end), key) in enumerate(zip(pairwise([0, *chain.ends]), chain.keys, strict=True)):
        tokens = chain.tokens[start:end].tobytes()
        chunk = catalogue.get(key, parent, tokens) or catalogue.insert(parent, [(key, tokens)])[0]
        chunk.ready |= index >= len(ready) or ready[index]
        chunks.append(chunk)
        parent = chunk
    return chunks


class NaiveModel:
    """Every stored chain as a list of chunks, and which of them are ready."""

    def __init__(self):
        self.ready = {}

    def store(self, chain, ready):
        path = ()
        for index, (start, end) in enumerate(pairwise([0, *chain.ends])):
            path += (tuple(chain.tokens[start:end].tolist()),)
            self.ready[path] = self.ready.get(path, False) or index >= len(ready) or ready[index]

    def longest(self, tokens):
        readable = [p for p in self.ready if all(self.ready[p[: at + 1]] for at in range(len(p)))]
        return max((common(tokens, sum(path, ())) for path in readable), default=0)


def check(match, chain, limit):
    """A match holds what it says."""
    assert match.length <= min(limit, len(chain.tokens))
    position, parent = 0, None
    for chunk in match.chunks:
        assert chunk.ready and position < match.length
        assert chunk.parent is parent or parent is None
        parent = chunk
        shared = min(len(chunk), match.length - position)
        assert chunk.tokens[: TOKEN_BYTES * shared] == chain.tokens[position : position + shared].tobytes()
        position += len(chunk)
    assert position >= match.length
    assert bool(match) == bool(match.chunks) == (match.length > 0)
    if match.whole_tail is not None:
        assert match.whole_tail is match.chunks[-1] and position == match.length


token_lists = st.lists(st.integers(0, 2), max_size=14)
size_lists = st.lists(st.integers(1, 4), max_size=14)
stored_lists = st.lists(st.tuples(token_lists, size_lists, st.lists(st.booleans(), max_size=4)), max_size=12)


@QUICK
@given(stored_lists, token_lists, st.integers(1, 4), st.integers(0, 16))
def test_match_is_the_longest_stored_prefix(stored, prompt, size, limit):
    """On a grid no chunk is the beginning of its sibling, so nothing is missed."""
    catalogue, model = PrefixTree(), NaiveModel()
    for tokens, _, ready in stored:
        chain = cut_chain(tokens, [size] * 14)
        store(catalogue, chain, ready)
        model.store(chain, ready)
    chain = cut_chain(prompt, [size] * 14)
    match = catalogue.match(catalogue.root(SPACE), chain, limit)
    check(match, chain, limit)
    assert match.length == model.longest(prompt[:limit])


@QUICK
@given(stored_lists, token_lists, size_lists, st.integers(0, 16))
def test_match_is_sound_however_chains_are_cut(stored, prompt, sizes, limit):
    catalogue, model = PrefixTree(), NaiveModel()
    for tokens, cuts, ready in stored:
        chain = cut_chain(tokens, cuts)
        store(catalogue, chain, ready)
        model.store(chain, ready)
    chain = cut_chain(prompt, sizes)
    match = catalogue.match(catalogue.root(SPACE), chain, limit)
    check(match, chain, limit)
    assert match.length <= model.longest(prompt[:limit])
    first = max((common(prompt[:limit], path[0]) for path in model.ready if model.ready[path[:1]]), default=0)
    assert match.length >= min([first, *chain.ends[:1]])  # no less than the best of the first chunks gives


@QUICK
@given(token_lists, size_lists, size_lists, st.integers(0, 14))
def test_one_stored_chain_is_found_whole_however_the_prompt_is_cut(tokens, sizes, other, limit):
    catalogue = PrefixTree()
    chunks = store(catalogue, cut_chain(tokens, sizes))
    match = catalogue.match(catalogue.root(SPACE), cut_chain(tokens, other), limit)
    assert match.length == min(limit, sum(map(len, chunks)))
    assert list(match.chunks) == chunks[: len(match.chunks)]


@QUICK
@given(st.data(), st.lists(st.tuples(token_lists, size_lists), max_size=10))
def test_leaves_can_be_removed_in_any_order(data, stored):
    catalogue, chunks = PrefixTree(), []
    for tokens, sizes in stored:
        chunks += [c for c in store(catalogue, cut_chain(tokens, sizes)) if c not in chunks]
    assert list(catalogue) == chunks
    while chunks:
        inner = {chunk.parent for chunk in chunks}
        chunk = data.draw(st.sampled_from([c for c in chunks if c not in inner]))
        chunks.remove(chunk)
        catalogue.remove(chunk)
        assert chunk not in catalogue and len(catalogue) == len(chunks)
        parent, siblings = chunk.parent, [c for c in chunks if c.parent is chunk.parent]
        left = parent.children if isinstance(parent.children, list) else [parent.children]
        assert sorted(siblings, key=lambda c: c.tokens) == (left if siblings else [])
    assert catalogue.root(SPACE).children is None


def test_a_parent_and_a_stranger_cannot_be_removed():
    catalogue = PrefixTree()
    parent, child = store(catalogue, cut_chain([1, 2], [1, 1]))
    with pytest.raises(ValueError, match="children"):
        catalogue.remove(parent)
    catalogue.remove(child)
    with pytest.raises(KeyError):
        catalogue.remove(child)
    assert parent in catalogue and len(catalogue) == 1


def test_a_root_lives_while_chunks_stand_behind_it():
    catalogue = PrefixTree()
    root = catalogue.root(SPACE)
    assert catalogue.root(SPACE) is not root, "looking up a namespace must not keep it"
    (first,) = catalogue.insert(root, [(b"k1", raw(1))])
    assert catalogue.root(SPACE) is root
    catalogue.remove(first)
    catalogue.insert(root, [(b"k2", raw(2))])[0].ready = True
    assert catalogue.match(catalogue.root(SPACE), cut_chain([2, 3], []), 2).length == 1


def test_namespaces_do_not_meet():
    catalogue = PrefixTree()
    store(catalogue, cut_chain([1, 2, 3], [3]))
    other = b"namespace of two"
    assert not catalogue.match(catalogue.root(other), cut_chain([1, 2, 3], [3], other), 3)


def test_thousands_of_siblings_are_not_walked(monkeypatch):
    catalogue = PrefixTree()
    common_start = list(range(40))
    for number in range(6000):
        tokens = [*common_start, number * 7919 % 6007, number]
        store(catalogue, cut_chain(tokens, [42]), [number % 3 != 0])
    compared = []
    monkeypatch.setattr(prefix_tree, "shared_tokens", lambda a, b: compared.append(a) or shared_tokens(a, b))
    for number, ready in ((4000, True), (3000, False)):
        prompt = [*common_start, number * 7919 % 6007, number, 5]
        compared.clear()
        match = catalogue.match(catalogue.root(SPACE), cut_chain(prompt, []), 43)
        assert match.length == (42 if ready else 40)
        assert 0 < len(compared) <= 2


def test_unready_siblings_do_not_hide_a_ready_one():
    catalogue = PrefixTree()
    store(catalogue, cut_chain([1, 2, 3, 0], [4]))
    for number in range(1, 50):
        store(catalogue, cut_chain([1, 2, 3, number], [4]), [False])
    assert catalogue.match(catalogue.root(SPACE), cut_chain([1, 2, 3, 50], []), 4).length == 3


def test_a_whole_tail_is_told_from_a_part():
    catalogue = PrefixTree()
    (tail,) = store(catalogue, cut_chain([1, 2, 3], [3]))
    root = catalogue.root(SPACE)
    assert catalogue.match(root, cut_chain([1, 2, 3, 4], []), 4).whole_tail is tail
    assert catalogue.match(root, cut_chain([1, 2, 4], []), 3).whole_tail is None
    assert catalogue.match(root, cut_chain([1, 2, 3, 4], [3]), 4).whole_tail is None
    assert catalogue.match(root, cut_chain([1, 2, 3], [3]), 2) == prefix_tree.Match((tail,), 2)


def test_equal_keys_with_other_tokens_are_refused():
    catalogue = PrefixTree()
    root = catalogue.root(SPACE)
    (chunk,) = catalogue.insert(root, [(b"key", raw(1, 2))])
    chunk.ready = True
    assert catalogue.insert(root, [(b"new", raw(5)), (b"key", raw(3, 4)), (b"more", raw(6))])[1:] == []
    assert catalogue.get(b"key", root, raw(1, 2)) is chunk
    assert catalogue.get(b"key", root, raw(3, 4)) is None
    assert catalogue.get(b"key", chunk, raw(1, 2)) is None
    chain = TokenChain(SPACE, None)
    chain.tokens, chain.ends, chain.keys = as_tokens([3, 4]), [2], [b"key"]
    assert not catalogue.match(root, chain, 2)


def test_a_collision_of_hashes_costs_the_store_and_nothing_else(monkeypatch):
    for module in ("keys", "chunking"):
        monkeypatch.setattr(f"ragkv.kvstore.{module}.chain_key", lambda parent, tokens: b"the same for all")
    metrics = Metrics()
    memory = MemoryTier(4, make_policy("lru"), 16, 1, metrics)
    chunker = Chunker(16, 24, 48, TokenStructure.of([]))
    first, second = TokenChain(SPACE, chunker), TokenChain(SPACE, chunker)
    first.extend(as_tokens([1] * 48))
    second.extend(as_tokens([2] * 48))
    (chunk,) = memory.reserve(SPACE, first, 48)
    memory.commit(chunk)
    assert memory.reserve(SPACE, second, 48) == []
    assert memory.match(SPACE, first, 48).chunks == (chunk,), "room must not be made for what is refused"
    assert not memory.match(SPACE, second, 48)
    counted = {name: n for name, n in metrics.drain()["counters"].items() if m.REFUSED_CHUNKS in name}
    assert counted == {m.REFUSED_CHUNKS + m.SEPARATOR + m.COLLISION: 1}
    memory.check_integrity()


def test_a_cleared_catalogue_is_empty():
    catalogue = PrefixTree()
    chunks = store(catalogue, cut_chain([1, 2], [1, 1]))
    catalogue.clear()
    assert len(catalogue) == 0 and list(catalogue) == [] and chunks[0] not in catalogue
    assert not catalogue.match(catalogue.root(SPACE), cut_chain([1, 2], [1, 1]), 2)


@given(st.lists(st.integers(-(2**31), 2**31 - 1)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_tokens(start, a, b):
    a, b = start + a, start + b
    assert shared_tokens(raw(*a), raw(*b)) == common(a, b) >= len(start)


def test_rows_follow_the_pages():
    catalogue = PrefixTree()
    chunks = store(catalogue, cut_chain(range(11), [6, 5]))
    chunks[0].pages, chunks[1].pages = raw(7, 2), raw(0, 5)
    assert rows(chunks, 4).tolist() == [28, 29, 30, 31, 8, 9, 0, 1, 2, 3, 20]
    assert rows([], 4).tolist() == [] and rows([], 4).dtype == np.int64
    chunks[0].device, chunks[1].device = raw(1, 0), raw(3, 2)
    assert rows(chunks, 4, device=True).tolist() == [4, 5, 6, 7, 0, 1, 12, 13, 14, 15, 8]


@QUICK
@given(st.lists(st.tuples(token_lists, size_lists), max_size=10))
def test_a_chunk_knows_its_namespace_its_position_and_all_behind_it(stored):
    catalogue, chunks = PrefixTree(), {}
    for tokens, sizes in stored:
        chain = cut_chain(tokens, sizes)
        chunks |= dict(zip(store(catalogue, chain), [0, *chain.ends], strict=False))
    for chunk, position in chunks.items():
        assert origin(chunk) == (SPACE, position)
        behind, above = descendants(chunk), set()
        for each in behind:
            assert each is chunk or each.parent in above, "parents before their children"
            above.add(each)
        assert len(above) == len(behind)
        assert above == {each for each in chunks if chunk in lineage(each)}


def lineage(chunk):
    found = []
    while chunk is not None:
        found.append(chunk)
        chunk = chunk.parent
    return found


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_a_chunk_weighs(policy):
    """With its policy node, keys and pages, beside its tokens; at a count where dicts have just grown. Half is the
    policy's: a node, a rank, a dict entry, and what some remember of keys that are gone."""
    count, length, size, kept = 5_500, 100, 83, []

    def fill():
        memory = MemoryTier(6 * count, make_policy(policy), 16, 1, Metrics())
        kept.append(memory)
        for number in range(count // length):
            tokens = np.arange(number, number + length * size, dtype=np.int32)
            chain = cut_chain(tokens.tolist(), [size] * length)
            for chunk in memory.reserve(SPACE, chain, len(tokens)):
                memory.commit(chunk)

    each = grown(fill) / count - TOKEN_BYTES * size
    assert len(kept[0]) == count
    assert 0 < each < (575 if policy == "lru" else 725), f"{each:.0f} bytes a chunk"
