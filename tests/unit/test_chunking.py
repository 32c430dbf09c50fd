"""Where chunks end, and what they are called: alike in every process, behind every prefix, in any steps."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

from ragkv.kvstore.chunking import HASH_WINDOW, Chunker, TokenChain, TokenStructure, rolling_hash
from ragkv.kvstore.keys import as_tokens, chain_key, content_key, namespace

VOCABULARY = ["\n\n", "\n", " ", ".\n \n", *(f" w{number}" for number in range(4, 500))]
STRUCTURE = TokenStructure.of(VOCABULARY)
NO_STRUCTURE = TokenStructure.of([])
MIN, AVERAGE, MAX = 16, 24, 48
SMALL = Chunker(MIN, AVERAGE, MAX, STRUCTURE)
PARAGRAPH, LINE, SPACE, WORD = 0, 1, 2, 4
QUICK = settings(max_examples=150, deadline=None)


def long_lists(of):
    """Lists of up to 480, and rarely as short as Hypothesis likes them."""
    return st.lists(st.lists(of, min_size=1, max_size=60), max_size=8).map(
        lambda parts: [token for part in parts for token in part]
    )


# Mostly words, with more breaks than text has, of all kinds.
token_lists = long_lists(st.sampled_from([PARAGRAPH, LINE, SPACE, 3, *range(4, 40)]))
boundaries = st.lists(st.integers(1, 450), max_size=6).map(lambda names: sorted(set(names)))

# fmt: off
GOLDEN_ENDS = [
    62, 123, 184, 245, 444, 522, 630, 690, 916, 1000, 1038, 1099, 1160, 1221, 1282, 1327, 1369, 1404, 1465,
    1526, 1587, 1648, 1709, 1770, 1831, 1892, 1953,
]
# fmt: on
GOLDEN_KEYS = {
    0: "480731ece8236983565c03274ed57caa",
    1: "eed964aecca1bfaf31583a729f1310ef",
    14: "14f703a950af2af9a0caab35dcd6e44a",
    26: "c4908d31a08e616dadf4b7852ab089b1",
}
GOLDEN_NAMESPACE = "4283ef2c5a95c00946b36d114ccf4a92"
GOLDEN_CONTENT = "7bc8e12c04bf80164c2fcf414159b0b7"


def generated(size):
    """Tokens without Python's or numpy's random numbers: about one in 60 is a blank line."""
    ids = (np.arange(1, size + 1, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)) >> np.uint64(7)
    ids %= np.uint64(len(VOCABULARY))
    ids[::61] = PARAGRAPH
    ids[300:900] = np.maximum(ids[300:900], WORD)  # and a stretch without one
    return as_tokens(ids.tolist())


def golden():
    chain = TokenChain(namespace({"model": "golden"}), Chunker(32, 128, 256, STRUCTURE), named=[444, 1000])
    chain.extend(generated(2000))
    return chain.ends, [key.hex() for key in chain.keys]


def one_shot(tokens, named=(), chunker=SMALL):
    chain = TokenChain(b"root" * 4, chunker, named)
    chain.extend(as_tokens(tokens))
    return chain


def test_ends_and_keys_are_pinned():
    ends, keys = golden()
    assert ends == GOLDEN_ENDS
    assert {index: keys[index] for index in GOLDEN_KEYS} == GOLDEN_KEYS


def test_ends_and_keys_do_not_depend_on_the_process():
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import json, runpy; print(json.dumps(runpy.run_path({__file__!r})['golden']()))",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == list(golden())


@QUICK
@given(token_lists, boundaries, st.lists(st.integers(0, 400), max_size=8))
def test_any_steps_cut_alike(tokens, named, splits):
    whole = one_shot(tokens, named)
    chain = TokenChain(b"root" * 4, SMALL, named)
    for start, end in pairwise([0, *sorted(min(at, len(tokens)) for at in splits), len(tokens)]):
        before = list(chain.ends)
        chain.extend(as_tokens(tokens[start:end]))
        assert chain.ends[: len(before)] == before
    assert (chain.ends, chain.keys) == (whole.ends, whole.keys)
    assert chain.tokens.tolist() == tokens


@QUICK
@example([7] * 100, list(range(1, 100)))  # such hints once made a chunk, a file and a key of every token
@example([], [1, 2])
@given(token_lists, boundaries)
def test_sizes(tokens, named):
    ends = SMALL.cut(as_tokens(tokens), named=named)
    sizes = [end - start for start, end in pairwise([0, *ends])]
    assert all(0 < size <= MAX for size in sizes) and len(tokens) - max(ends, default=0) <= MAX
    assert all(end in named for end, size in zip(ends, sizes, strict=True) if size < MIN)
    assert all(max(two) >= MIN for two in pairwise(sizes)), "no two in a row are short"
    last = 0
    for name in named:
        if name in ends:
            last = name
        else:
            assert name - last < MIN or name > len(tokens), "it is far enough behind the last that is kept"


@QUICK
@given(token_lists)
def test_a_paragraph_break_in_range_is_taken_first(tokens):
    tokens = as_tokens(tokens)
    breaks = STRUCTURE.breaks(tokens).tolist()
    for start, end in pairwise([0, *SMALL.cut(tokens)]):
        in_range = [at for at in breaks if start + MIN <= at <= start + MAX]
        assert end == in_range[0] if in_range else end not in breaks


@QUICK
@example([])
@given(token_lists)
def test_keys_name_the_whole_prefix(tokens):
    chain = one_shot(tokens)
    key = b"root" * 4
    for (start, end), found in zip(pairwise([0, *chain.ends]), chain.keys, strict=True):
        key = chain_key(key, as_tokens(tokens[start:end]).tobytes())
        assert found == key


words = long_lists(st.integers(WORD, 400))
paragraphs = st.lists(st.lists(st.integers(WORD, 400), min_size=MIN, max_size=MAX - 1), max_size=5)


@QUICK
@given(paragraphs, paragraphs, long_lists(st.integers(WORD, 400) | st.just(PARAGRAPH)))
def test_a_passage_cuts_alike_behind_any_paragraphs(before, other, passage):
    passage = [WORD, *passage, WORD]
    cuts = []
    for prefix in (before, other):
        prefix = [token for paragraph in prefix for token in [*paragraph, PARAGRAPH]]
        ends = SMALL.cut(as_tokens(prefix + passage))
        assert not prefix or len(prefix) in ends
        cuts.append([end - len(prefix) for end in ends if end > len(prefix)])
    assert cuts[0] == cuts[1]


@QUICK
@given(words, words, long_lists(st.integers(WORD, 30) | st.just(PARAGRAPH)))
def test_cuts_that_meet_stay_together(before, other, passage):
    """Whatever stands before: once two prompts have a boundary in common, they have all later ones."""
    cuts = []
    for prefix in (before, other):
        ends = SMALL.cut(as_tokens([*prefix, *passage]))
        cuts.append([end - len(prefix) for end in ends if end > len(prefix)])
    if met := set(cuts[0]) & set(cuts[1]):
        assert [at for at in cuts[0] if at >= min(met)] == [at for at in cuts[1] if at >= min(met)]


def test_cuts_without_paragraphs_meet_again():
    text = generated(3000).tolist()
    text = [max(token, WORD) for token in text]
    plain = SMALL.cut(as_tokens(text))
    shifted = [end - 7 for end in SMALL.cut(as_tokens([99] * 7 + text))]
    assert len(set(plain) & set(shifted)) > 0.8 * len(plain)


@pytest.mark.parametrize(
    ("texts", "ends"),
    [
        (["a", "\n\n", "b"], [2]),
        (["a", " \n\n", "b"], [2]),
        (["a.\n\n", "b"], [1]),
        (["a\n\nb", "c"], [1]),
        (["a", "\r\n\r\n", "b"], [2]),
        (["a", "\n", "\n", "b"], [3]),
        (["a", "\n", " ", "\t", "\n", "b"], [5]),
        (["a.\n", "\nb", "c"], [2]),
        (["a.\n", " \n b", "c"], [2]),
        (["a", "\n", "\n", "\n", "\n", "b"], [5]),
        (["a", "\n\n", "\n", "b"], [3]),
        (["a", "\n", "b", "\n", "c"], []),
        (["a", "\n", "", "\n", "c"], []),
        (["\n", "a"], []),
        ([" ", "\n", "a"], []),
        (["\n\n", "a"], [1]),
        (["a", "\n\n"], []),
        (["a", "\n", "\n"], []),
        ([], []),
    ],
)
def test_blank_lines_may_be_spread_over_tokens(texts, ends):
    vocabulary = sorted(set(texts))
    tokens = as_tokens([vocabulary.index(text) for text in texts])
    assert TokenStructure.of(vocabulary).breaks(tokens).tolist() == ends


def test_ids_outside_the_vocabulary_are_text():
    tokens = generated(500).tolist()
    known = [WORD if token == 5 else token for token in tokens]
    for strange in (len(VOCABULARY), 2**31 - 1, -1, -(2**31)):
        assert STRUCTURE.breaks(as_tokens([strange, LINE, LINE, strange, PARAGRAPH, strange])).tolist() == [
            3,
            5,
        ]
        unknown = [strange if token == 5 else token for token in tokens]
        assert (STRUCTURE.breaks(as_tokens(unknown)) == STRUCTURE.breaks(as_tokens(known))).all()


def test_without_structure_the_hash_decides():
    chunker = Chunker(32, 128, 256, NO_STRUCTURE)
    tokens = generated(20_000)
    ends = chunker.cut(tokens)
    sizes = np.diff([0, *ends])
    assert sizes.min() >= 32 and sizes.max() <= 256
    assert 100 < sizes.mean() < 140
    hashes = rolling_hash(tokens)
    at_hash = [end for end, size in zip(ends, sizes, strict=True) if size < 256]
    assert len(at_hash) > len(ends) / 2
    assert max(hashes[end - 1] for end in at_hash) <= 2**64 // 96


def test_monotonous_text_is_cut_at_the_maximum():
    assert rolling_hash(as_tokens([7] * HASH_WINDOW))[-1] > 2**64 // (AVERAGE - MIN)
    assert SMALL.cut(as_tokens([7] * 200)) == [48, 96, 144, 192]


def test_the_hash_looks_at_its_window_only():
    tokens = generated(300)
    whole = rolling_hash(tokens)
    for end in range(HASH_WINDOW, 300, 37):
        assert rolling_hash(tokens[end - HASH_WINDOW : end])[-1] == whole[end - 1]
        changed = tokens.copy()
        changed[end - HASH_WINDOW] += 1
        assert rolling_hash(changed)[end - 1] != whole[end - 1]


def test_named_boundaries_near_each_other_and_at_the_very_end():
    tokens = as_tokens([7] * 60)
    assert SMALL.cut(tokens, named=[1, 3, 59, 60, 61]) == [1, 43, 59, 60]
    assert SMALL.cut(tokens, start=43, named=[1, 3, 59, 60, 61]) == [59, 60]
    assert SMALL.cut(tokens, named=[60]) == [44, 60]
    assert SMALL.cut(tokens[:59], named=[1, 3, 60]) == [1, 44]
    assert SMALL.cut(tokens[:17], named=[1, 16]) == [1]
    assert SMALL.cut(tokens[:15], named=[1, 15]) == [1]


def test_a_document_behind_a_short_beginning_is_cut_as_anywhere():
    """A system prompt of a few words must not become a part of the first passage."""
    head, passage = as_tokens([7] * 9), generated(40)
    alone, behind = SMALL.cut(passage, named=[40]), SMALL.cut(np.concatenate([head, passage]), named=[9, 49])
    assert behind == [9, *(9 + end for end in alone)] and 40 in alone


def test_a_paragraph_too_near_a_named_boundary_gives_way():
    tokens = as_tokens([7] * 19 + [PARAGRAPH] + [7] * 60)
    assert SMALL.cut(tokens)[0] == 20
    assert SMALL.cut(tokens, named=[36])[:2] == [20, 36]
    assert SMALL.cut(tokens, named=[35])[:1] == [35]


@pytest.mark.parametrize(
    "sizes", [(15, 24, 48), (16, 16, 48), (16, 49, 48), (24, 16, 48), (0, 1, 2), (-1, 24, 48)]
)
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=rf"{sizes[0]}/{sizes[1]}/{sizes[2]}.*16 <= min < average <= max"):
        Chunker(*sizes, STRUCTURE)


def test_an_average_next_to_the_minimum_always_cuts_there():
    assert Chunker(16, 17, 48, NO_STRUCTURE).cut(generated(100)) == [16, 32, 48, 64]


def test_namespaces_differ_where_anything_does():
    identities = [
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": b"1"},
        {"a": None},
        {"a": [1]},
        {"a": [["b", 1]]},
        {"a": {"b": 1}},
        {"a": {"b": 1, "c": 2}},
        {"a": "\ud800"},
        {},
    ]
    assert len({namespace(identity) for identity in identities}) == len(identities)
    assert namespace({"a": 1, "b": {"c": 2, "d": 3}}) == namespace({"b": {"d": 3, "c": 2}, "a": 1})
    assert namespace({"a": (1, 2)}) == namespace({"a": [1, 2]})
    assert namespace({"model": "golden"}).hex() == GOLDEN_NAMESPACE


@pytest.mark.parametrize("value", [object(), {1: 2}, np.float32(1)])
def test_a_namespace_needs_stable_bytes(value):
    with pytest.raises(TypeError):
        namespace({"a": value})


def test_a_content_key_is_of_tokens_and_namespace_alone():
    space, other = namespace({"model": "golden"}), namespace({"model": "other"})
    tokens, more = as_tokens([1, 2, 3]).tobytes(), as_tokens([1, 2, 3, 4]).tobytes()
    key = content_key(space, tokens)
    assert key.hex() == GOLDEN_CONTENT and content_key(space, tokens) == key
    assert len({key, content_key(other, tokens), content_key(space, more), content_key(space, b"")}) == 4
    assert key != chain_key(space, tokens), "a chunk at the start of a prompt has two names"
