"""Work on the scheduler's thread, counted: bounded in the length of the prompt, whatever is stored and asked."""

import random
from contextlib import ExitStack

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from matching_tools import NAMESPACE, TokenStore, counted
from ragkv.connectors.vllm import turns
from ragkv.connectors.vllm.turns import Conversations
from ragkv.kvstore import chunking, prefix_tree
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.fusion import matching, plan
from ragkv.kvstore.fusion.matching import Piece
from ragkv.kvstore.fusion.plan import MOST_RUNS, Plan, decisions
from ragkv.kvstore.keys import as_tokens
from ragkv.kvstore.memory_tier import MemoryTier
from ragkv.kvstore.metrics import Metrics
from ragkv.kvstore.pins import AT_ONCE, MOST_ENTRIES, Pins
from ragkv.kvstore.prefix_tree import Chunk, ContentIndex, PrefixTree
from ragkv.policies import make_policy

STRUCTURE = TokenStructure.of(["a"] * 5 + ["\n\n"] + ["a"] * 1000)
BREAK = 5
DEFAULT = Chunker(32, 128, 256, STRUCTURE)
SMALL = Chunker(16, 24, 48, STRUCTURE)
A_CUT = 4 * (matching.FOLLOWED + matching.FORKS + matching.LOOKED_AT)  # steps of a search


def words(seed, size):
    chance = random.Random(str(seed))
    return [chance.randrange(10, 1000) for _ in range(size)]


def paragraph(seed, size=61):
    return [*words(seed, size - 1), BREAK]


def steps_of(store, asked, named=()):
    """Steps of a search for `asked`, and of how many cuts it was."""
    chain = store.chain(asked, named)
    match = store.catalogue.match(store.catalogue.root(NAMESPACE), chain, len(asked) - 1)
    names = ("children_of", "longest_shared", "shared_tokens", "_shared_last", "_cost", "Piece", "_Holder")
    with counted(matching, *names) as all_of_it, counted(ContentIndex, "holders") as lookups:
        matching.find_moved(store.contents, NAMESPACE, chain, match.length, len(asked) - 1, match.chunks)
    return all_of_it.count + lookups.count, len(chain.ends) + 1


def test_one_paragraph_over_and_over():
    """1,600 times: it once took seconds."""
    found = {}
    for repeats in (100, 200, 1600):
        store = TokenStore(DEFAULT)
        store.add(paragraph(1, 81) + paragraph(2) * repeats)
        found[repeats], cuts = steps_of(store, paragraph(3, 101) + paragraph(2) * repeats)
        assert cuts > repeats
    assert found[200] <= 2.2 * found[100] and found[1600] <= 17 * found[100]
    assert found[1600] <= 30 * matching.MOST_CUTS


@pytest.mark.parametrize("chains", [1, 40])
def test_very_many_chunks_of_the_same_tokens_cost_what_a_few_do(chains):
    """Behind very many different texts, or deep in one."""
    found = []
    for repeats in (20, 400):
        store = TokenStore(SMALL)
        for number in range(chains):
            beside = [
                token for other in range(repeats // chains) for token in paragraph(1) + paragraph((number, other))
            ]
            store.add(paragraph(number, 90) + beside)
        found.append(steps_of(store, paragraph("asked", 70) + paragraph(1) * 50))
    (few, cuts), (many, _) = found
    assert many <= max(4 * few, A_CUT * cuts) and many <= A_CUT * cuts + matching.CLIMBED


def test_thousands_of_documents_in_a_prompt_of_100_000_tokens():
    store = TokenStore(DEFAULT)
    documents = [paragraph(number, 50) for number in range(2000)]
    for number in range(0, 2000, 50):
        store.add([token for document in documents[number : number + 50] for token in document])
    random.Random(1).shuffle(documents)
    steps, cuts = steps_of(store, [token for document in documents for token in document])
    assert cuts >= 2000 and steps <= A_CUT * matching.MOST_CUTS
    exact, pieces = store.found([token for document in documents for token in document])
    assert exact == 0 and sum(map(len, pieces)) == 50 * matching.MOST_CUTS, "all that it looks for is found"


adversarial = st.lists(
    st.tuples(
        st.integers(0, 3), st.integers(1, 12), st.sampled_from(["same", "near", "cut", "none"]), st.integers(0, 50)
    ),
    min_size=1,
    max_size=8,
)


def made(parts):
    """Repeats of few paragraphs: alike, with a token changed, shortened, or with others between."""
    tokens = []
    for seed, times, kind, place in parts:
        for number in range(times):
            piece = paragraph(seed, 40)
            if kind == "near":
                piece[place % 39] = 10 + number
            tokens += piece[: 20 + place % 20] if kind == "cut" else piece
            tokens += paragraph((seed, number, place), 25) if kind == "none" else []
    return tokens


@settings(max_examples=100, deadline=None)
@given(st.lists(adversarial, min_size=1, max_size=6), adversarial, st.lists(st.integers(1, 900), max_size=20))
def test_whatever_is_stored_and_asked(stored, asked, named):
    store = TokenStore(SMALL)
    for parts in stored:
        store.add(made(parts), sorted(set(named)))
    tokens = made(asked)
    steps, cuts = steps_of(store, tokens, sorted(set(named)))
    assert steps <= A_CUT * (cuts + len(tokens) // 16) + matching.CLIMBED


def test_ancestors_are_climbed_within_a_budget(monkeypatch):
    """Each paragraph of the prompt stands deep in another conversation."""
    monkeypatch.setattr(matching, "CLIMBED", 100)
    store = TokenStore(SMALL)
    for number in range(30):
        store.add([token for turn in range(40) for token in paragraph((number, turn), 20)] + paragraph(number))
    tokens = [token for number in range(30) for token in paragraph(number)]
    with counted(matching, "shared_tokens", most=100 + 40):
        steps_of(store, tokens)
    exact, pieces = store.found(tokens)
    assert exact == 0 and sum(map(len, pieces)) == len(tokens) - 1, "nothing is missed"


def test_a_chain_that_is_cut_elsewhere_is_matched_without_looking_at_the_rest_each_time(monkeypatch):
    tokens = words(1, 100_000)
    store = TokenStore(DEFAULT)
    chain = store.chain(tokens)
    ends = list(range(40, 100_001, 40))
    store.add_cut(tokens, ends)
    compared = 0
    shared = prefix_tree.longest_shared

    def longest_shared(parent, raw):
        nonlocal compared
        compared += len(raw) // 4
        return shared(parent, raw)

    monkeypatch.setattr(prefix_tree, "longest_shared", longest_shared)
    match = store.catalogue.match(store.catalogue.root(NAMESPACE), chain, 99_999)
    assert match.length == 99_999 and compared <= prefix_tree.REACH * len(ends)


def test_a_chunk_longer_than_what_is_compared_at_first_is_matched_as_a_whole():
    tokens = words(1, 5000)
    store = TokenStore(Chunker(32, 4000, 8000, STRUCTURE))
    store.add_cut(tokens, [5000])
    assert store.catalogue.match(store.catalogue.root(NAMESPACE), store.chain(tokens[:4500]), 4500).length == 4500
    assert store.catalogue.match(store.catalogue.root(NAMESPACE), store.chain(tokens), 4999).length == 4999


def test_children_that_are_not_ready_are_passed_over_within_a_bound():
    store = TokenStore(SMALL)
    parent = store.add_cut(words(0, 20), [20])[0]
    for number in range(1000):
        (chunk,) = store.catalogue.insert(parent, [(number.to_bytes(16, "big"), as_tokens([7, number]).tobytes())])
        chunk.ready = False
    looked = 0

    class Looking(type(parent)):
        __slots__ = ()

        @property
        def ready(self):
            nonlocal looked
            looked += 1
            return False

    for child in parent.children:
        child.__class__ = Looking
    assert prefix_tree.longest_shared(parent, as_tokens([7, 500, 3]).tobytes()) == (None, 0)
    assert looked <= 2 * prefix_tree.LOOKED_AT


def test_cutting_looks_a_few_times_for_each_chunk():
    tokens = as_tokens(words(1, 100_000))
    for named in ((), range(1, 100_000), range(7, 100_000, 33)):
        with counted(chunking, "_next") as looked:
            ends = SMALL.cut(tokens, named=named)
        assert looked.count <= 3 * (len(ends) + 1) and len(ends) <= 2 * 100_000 // 16


def test_the_lengths_of_prompts_that_are_compared_are_bounded(monkeypatch):
    monkeypatch.setattr(turns, "MOST_LENGTHS", 50)
    conversations = Conversations()
    prompt = paragraph(1, 40) + words(2, 400)
    for size in range(60, 440):
        chain = TokenChain(NAMESPACE, Chunker(16, 1000, 2000, STRUCTURE))
        chain.extend(as_tokens([*prompt[: size - 1], 999]))
        conversations.remember(NAMESPACE, chain, 1)
    chain = TokenChain(NAMESPACE, Chunker(16, 1000, 2000, STRUCTURE))
    chain.extend(as_tokens(prompt))
    names = []
    monkeypatch.setattr(turns.xxhash, "xxh3_128", Digests(names))
    assert conversations.turn(NAMESPACE, chain) == 1
    assert 0 < len(names) <= 50


class Digests:
    """A hash of 128 bits, whose digests are counted."""

    def __init__(self, names):
        self._names = names

    def __call__(self, _start):
        return self

    def update(self, _more):
        pass

    def digest(self):
        self._names.append(1)
        return b"no prompt's name"


def pieces_of(count, shift):
    chunk = Chunk(b"", None, np.zeros(40, dtype=np.int32).tobytes())
    return [Piece(40 * n, 40 * n + 40, chunk, 0, shift(n)) for n in range(count)]


@pytest.mark.parametrize("shift", [lambda n: 7, lambda n: n % 2])
def test_documents_that_overlap_are_told_of_in_a_few_steps_each(shift):
    pieces = pieces_of(3000, shift)
    outcome = Plan(0, 120_000, tuple(pieces), 0, 0.0)
    documents = [(str(n), n, 120_000 - n) for n in range(256)]
    with ExitStack() as stack:
        looked = stack.enter_context(counted(plan.Cover, "_upto"))
        sized = stack.enter_context(counted(plan, "_shift"))
        found = decisions(documents, 0, pieces, outcome)
    assert [each.reused_tokens for each in found] == [120_000 - 2 * n for n in range(256)]
    assert looked.count <= 6 * 256 and sized.count == 256
    assert len(decisions((), 0, pieces, outcome)) <= MOST_RUNS


def pinnable(number, pages=1):
    chunk = Chunk(number.to_bytes(4, "big"), None, b"")
    chunk.pages = bytes(4 * pages)
    return chunk


class Unpinned:
    """Notes how many chunks each call unpins."""

    def __init__(self):
        self.calls = []

    def __call__(self, chunks):
        self.calls.append(len(chunks))


def test_an_owner_is_released_without_looking_at_others():
    told = Unpinned()
    holds = Pins(100_000, lambda chunks: None, told)
    chunks = [pinnable(number) for number in range(4)]
    held = [holds.hold(f"desk {number}", chunks[number % 4], 10.0) for number in range(20_000)]
    assert sum(held) == MOST_ENTRIES // 2 and all(held[: MOST_ENTRIES // 2]), "a tenant's books are bounded"
    with counted(Pins, "_counts", most=0):
        assert holds.release("desk 7") == 1 and holds.release("desk 20000") == 0
    assert holds.pages == 4 and not told.calls, "others hold it"


@pytest.mark.parametrize("how", ["released", "over"])
def test_very_many_pins_go_some_at_a_time(how):
    told = Unpinned()
    holds = Pins(100_000, lambda chunks: None, told)
    size = MOST_ENTRIES // 2
    assert all(holds.hold("desk", pinnable(number), 10.0) for number in range(size))
    assert how == "over" or holds.release("desk") == size
    while holds.pages:
        holds.due(11.0)
        holds.check_integrity()
    assert len(told.calls) == size // AT_ONCE and max(told.calls) <= AT_ONCE


def test_very_many_chunks_go_some_at_a_time_and_none_is_served_beyond_its_time():
    memory = MemoryTier(40_000, make_policy("lru"), 4, 100, Metrics())
    prompts = [words(seed, 700) for seed in range(100)]
    for number, prompt in enumerate(prompts):
        chain = TokenChain(NAMESPACE, SMALL)
        chain.extend(as_tokens(prompt))
        for chunk in memory.reserve(NAMESPACE, chain, 700, until=50.0 if number else 60.0):
            memory.commit(chunk)
    known = len(memory)
    assert known > 2 * AT_ONCE
    with counted(PrefixTree, "remove", most=AT_ONCE + 50) as removed:
        memory.tick(50.0)
    assert removed.count >= AT_ONCE and memory.pins.late

    def length(prompt):
        chain = TokenChain(NAMESPACE, SMALL)
        chain.extend(as_tokens(prompt))
        return memory.match(NAMESPACE, chain, 699).length

    assert [length(prompt) for prompt in prompts] == [699] + [0] * 99
    for _ in range(known // AT_ONCE):
        memory.tick(50.0)
    assert not memory.pins.late and 0 < len(memory) <= 700 // 16
    memory.check_integrity()
