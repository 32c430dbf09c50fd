"""Moved tokens are found wherever they were computed, from the best of their holders, and never wrongly."""

import random
import re
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from matching_tools import NAMESPACE, TokenStore, counted, covered, part
from memory_tier_tools import common
from ragkv.benchmarks.tenk import generate_filing
from ragkv.kvstore.chunking import Chunker, TokenStructure
from ragkv.kvstore.fusion import matching
from ragkv.kvstore.fusion.matching import find_moved
from ragkv.kvstore.prefix_tree import ContentIndex, origin

PARAGRAPH = 0
STRUCTURE = TokenStructure.of(["\n\n"] * 100 + [" w"] * 400)
MIN, AVERAGE, MAX = 16, 24, 48
OTHER = b"o" * 16
QUESTION = list(range(400, 420))


def new_store():
    return TokenStore(Chunker(MIN, AVERAGE, MAX, STRUCTURE))


def text(seed, size=40):
    """A paragraph of words and a blank line that no other seed's paragraphs share."""
    words = random.Random(seed)
    return [words.randrange(1, 10**6) * 1000 + 500 + seed for _ in range(size - 1)] + [seed]


def joined(lists):
    return [each for several in lists for each in several]


def spans(pieces):
    return [(piece.start, piece.end, piece.shift) for piece in pieces]


def moved(store, tokens, ends=None, start=0):
    """What is found of a prompt from `start` on; `ends`: where it is cut, unlike the chunker would."""
    chain = store.chain(tokens)
    chain.ends[:] = chain.ends if ends is None else ends
    return find_moved(store.contents, NAMESPACE, chain, start, len(tokens), ())


def assert_true(tokens, start, limit, pieces, namespace=NAMESPACE):
    """Pieces lie in order between the bounds, and say what their chunks hold and where that stood."""
    assert all(a.end <= b.start for a, b in pairwise(pieces))
    for piece in pieces:
        assert start <= piece.start < piece.end <= limit
        assert part(piece.chunk, piece.first, len(piece)) == list(tokens[piece.start : piece.end])
        assert origin(piece.chunk) == (namespace, piece.start - piece.shift - piece.first)
        assert piece.chunk.ready


def test_a_passage_is_found_at_another_position():
    store, a, b, c = new_store(), text(1), text(2), text(3)
    store.add(a + b + c)
    exact, pieces = store.found(text(4) + b + c + QUESTION)
    assert exact == 0
    assert spans(pieces) == [(40, 80, 0), (80, 120, 0)]
    exact, pieces = store.found(text(4, 50) + b + c + QUESTION)
    assert spans(pieces) == [(50, 90, 10), (90, 130, 10)]


def test_behind_an_exact_match_the_rest_is_found():
    store, system, a, b = new_store(), text(0), text(1), text(2)
    store.add(system + a)
    store.add(system + b)
    tokens = system + b + a + QUESTION
    exact, pieces = store.found(tokens)
    assert exact == 80 and spans(pieces) == [(80, 120, 40)]
    assert_true(tokens, exact, len(tokens) - 1, pieces)


BOS, A, B = [1], text(1, 120), text(2, 120)


@pytest.mark.parametrize(
    ("stored", "asked", "shift"), [(BOS + A, BOS + B + A, 120), (B + A, BOS + A, -119), (A, BOS + A, 1)]
)
def test_a_first_chunk_is_found_with_and_without_a_beginning_of_sequence(stored, asked, shift):
    """Stored behind BOS and now in the middle; stored in the middle and now behind BOS; stored as the first."""
    store, tokens = new_store(), asked + QUESTION
    store.add(stored)
    exact, pieces = store.found(tokens)
    assert exact == (stored[:1] == BOS) and sum(map(len, pieces)) >= 80
    assert {piece.shift for piece in pieces if len(piece) > 8} == {shift}
    assert_true(tokens, exact, len(tokens) - 1, pieces)


def test_another_namespace_is_another_world():
    store, a = new_store(), text(1)
    store.add(text(5) + a, namespace=OTHER)
    assert store.found(a + QUESTION)[1] == []
    store.add(text(6, 50) + a)
    assert spans(store.found(a + QUESTION)[1]) == [(0, 40, -50)]
    assert spans(store.found(a + QUESTION, namespace=OTHER)[1]) == [(0, 40, -40)]


def test_what_is_not_ready_is_not_found():
    store, a, b = new_store(), text(1), text(2, 80)
    _, first, second, *_ = store.add_cut(text(9) + a + b, [40, 80, 120, 160])
    third = second.children
    for chunk in (first, third):
        store.contents.remove(chunk)
        chunk.ready = False
    tokens = text(8, 30) + a + b + QUESTION
    pieces = moved(store, tokens, [30, 70, 110, 150])
    assert spans(pieces) == [(70, 110, -10)]


@pytest.mark.parametrize(("start", "limit"), [(0, 80), (25, 80), (45, 80), (0, 55), (45, 55), (79, 80), (80, 80)])
def test_a_cut_counts_with_its_part_between_the_bounds(start, limit):
    store, a, b = new_store(), text(1), text(2)
    store.add(text(9, 30) + a + b)
    chain = store.chain(a + b)
    pieces = find_moved(store.contents, NAMESPACE, chain, start, limit, ())
    assert_true(a + b, start, limit, pieces)
    assert sum(map(len, pieces)) == limit - start and {piece.shift for piece in pieces} <= {-30}


def test_the_tokens_behind_the_last_cut_are_looked_up_as_a_whole():
    store, tail = new_store(), text(1, 20)[:-1]
    store.add_cut(text(2) + tail, [40, 59])
    assert spans(find_moved(store.contents, NAMESPACE, store.chain(tail), 0, 18, ())) == [(0, 18, -40)]


def test_a_run_is_followed_into_the_next_chunk_and_the_open_tail():
    store, a, tail = new_store(), text(1), text(2, 12)[:-1]
    store.add(text(9) + a + tail)  # the tail is stored as such
    store.add(text(9) + a + text(3))
    tokens = text(7, 30) + a + tail[:8] + text(4)
    assert spans(store.found(tokens)[1]) == [(30, 70, -10), (70, 78, -10)]
    tokens = text(7, 30) + a + text(3)[:30] + text(4)
    assert spans(store.found(tokens)[1]) == [(30, 70, -10), (70, 100, -10)]


def test_a_run_is_followed_up_to_the_next_one():
    store, a, tail, b = new_store(), text(1), text(2, 12)[:-1], text(3)
    store.add(text(9) + a + tail)
    store.add_cut(text(6) + b, [40, 80])
    tokens = text(7, 30) + a + tail + b + QUESTION
    store.contents.remove(list(store.catalogue)[2])  # the tail is found through the tree alone
    pieces = moved(store, tokens, [30, 70, 81, 121])
    assert spans(pieces) == [(30, 70, -10), (70, 81, -10), (81, 121, 41)]


def test_a_run_is_followed_through_chunks_that_are_cut_elsewhere():
    store, a, b = new_store(), text(1), text(2, 90)
    store.add_cut(text(9) + a + b, [40, 80, 100, 130, 170])
    tokens = text(7, 30) + a + b + QUESTION
    assert spans(store.found(tokens)[1]) == [(30, 70, -10), (70, 90, -10), (90, 120, -10), (120, 160, -10)]


def test_a_run_ends_with_the_first_token_that_differs():
    store, a, b, c = new_store(), text(1), text(2, 60), text(3)
    store.add_cut(text(9) + a + b + c, [40, 80, 140, 180])
    tokens = text(7, 30) + a + b[:20] + c + QUESTION
    for chunk in list(store.catalogue)[2:]:
        store.contents.remove(chunk)
    pieces = moved(store, tokens)
    assert spans(pieces) == [(30, 70, -10), (70, 90, -10)]
    store = new_store()
    store.add_cut(a + b + c, [40, 100, 140])
    tokens = text(7, 30) + a + b[20:] + c + QUESTION
    pieces = moved(store, tokens, [30, 110, 150])
    assert spans(pieces) == [(70, 110, 10), (110, 150, 10)]


def test_what_stands_before_a_run_is_found_too():
    store, a, b = new_store(), text(1, 60), text(2)
    store.add_cut(text(9) + a + b, [35, 70, 100, 140])
    tokens = text(7, 30) + a[10:] + b + QUESTION
    pieces = moved(store, tokens, [40, 80, 120])
    assert_true(tokens, 0, len(tokens), pieces)
    assert spans(pieces) == [(30, 50, 20 - 40), (50, 80, -20), (80, 120, -20)]
    pieces = moved(store, tokens, [40, 80, 120], start=45)
    assert [piece.start for piece in pieces] == [45, 50, 80]


def test_a_run_does_not_go_on_over_the_next():
    store, a, between, b = new_store(), text(1), text(2, 10), text(3)
    store.add_cut(text(8) + a + between + b[:30], [40, 80, 120])
    store.add_cut(text(7) + b, [40, 80])
    tokens = a + between + b + QUESTION
    pieces = moved(store, tokens, [40, 50, 90])
    assert spans(pieces) == [(0, 40, -40), (40, 50, -40), (50, 90, 10)]


def test_one_passage_does_not_reach_into_its_neighbour():
    store, a, b = new_store(), text(1), text(2)
    store.add_cut(text(8) + a + b[:20] + text(6), [40, 80, 120])
    store.add_cut(text(7) + a[20:] + b, [40, 60, 100])
    tokens = a + b + QUESTION
    _, pieces = store.found(tokens)
    assert_true(tokens, 0, len(tokens), pieces)
    assert [(piece.start, piece.end) for piece in pieces] == [(0, 40), (40, 80)]


def test_the_one_behind_the_shared_system_prompt_is_preferred():
    for swapped in (False, True):
        store, system, a, b = new_store(), text(0), text(1), text(2)
        variants = [system + a + b, system + text(9, 60) + a + b]
        for tokens in reversed(variants) if swapped else variants:
            store.add(tokens)
        exact, pieces = store.found(system + text(5, 30) + a + b + QUESTION)
        assert exact == 40 and spans(pieces) == [(70, 110, 30), (110, 150, 30)]


def test_a_system_prompt_that_shares_its_chunk_with_a_document_is_shared_all_the_same():
    store, system, a = new_store(), text(0, 10), text(1)
    store.add_cut(system + text(7, 14) + a, [24, 64])
    store.add_cut(text(8, 20) + a, [20, 60])
    store.add_cut(system + text(6, 30), [40])
    tokens = system + text(5, 30) + a + QUESTION
    for start, stored in ((10, 24), (0, 20)):  # 14 foreign tokens against 20; or else 24
        pieces = moved(store, tokens, [40, 80], start)
        assert [(piece.start, piece.start - piece.shift) for piece in pieces] == [(40, stored)]


def test_a_passage_is_not_patched_together_for_little():
    system, a, b, c = text(0), text(1) + text(11), text(2), text(3)
    prompt = system + text(5, 30) + a + b + c + QUESTION

    def shifts(*stored):
        store = new_store()
        for tokens in stored:
            store.add(tokens)
        return [piece.shift for piece in store.found(prompt)[1]]

    few, many, alone = system + text(8, 16) + a + b + c, system + text(8, 80) + a + b + c, system + b
    assert shifts(few, alone) == shifts(alone, few) == [14, 14, 14, 14]
    assert shifts(many, system + text(9, 16)) == [-50, -50, -50, -50]
    assert shifts(many, alone) == shifts(alone, many) == [-50, -50, 110, -50]


def test_what_only_stands_at_the_same_positions_is_foreign():
    store, system, b, a = new_store(), text(0), text(2), text(1)
    store.add(text(8) + b + a)
    store.add(text(9, 60) + a)
    tokens = system + b + text(5, 30) + a + QUESTION
    pieces = moved(store, tokens, start=80)
    assert spans(pieces) == [(110, 150, 50)]


def test_what_shares_its_chunk_with_the_own_document_is_not_foreign():
    store, a, b = new_store(), text(1), text(2)
    store.add_cut(text(8, 10) + a[10:] + b, [40, 80])
    store.add_cut(text(9, 20) + b, [20, 60])
    tokens = text(5, 30) + a + b + QUESTION
    pieces = moved(store, tokens, [30, 70, 110])
    assert spans(pieces) == [(40, 70, 30), (70, 110, 30)]


def test_ties_go_to_where_the_last_one_stopped_and_else_to_the_latest():
    store, a, b = new_store(), text(1), text(2)
    store.add(text(7) + a)
    _, later, _ = store.add(text(8) + a + b)
    store.add(text(7) + a + b)
    _, pieces = store.found(text(5, 30) + a + b + QUESTION)
    assert pieces[0].chunk is later is pieces[1].chunk.parent
    store = new_store()
    latest = [store.add(text(seed) + a)[-1] for seed in (7, 8, 9)][-1]
    assert store.found(text(5, 30) + a + QUESTION)[1][0].chunk is latest


def test_chunks_that_stand_for_themselves_are_placed_where_they_were_computed():
    """As those do that come from a lower tier without what stood before them."""
    store, system, a, b = new_store(), text(0), text(1), text(2)
    store.add(system)
    loose = [store.add_loose(a, 100), store.add_loose(b, 140)]
    store.add(system + text(9, 100) + b)
    tokens = system + text(5, 30) + a + b + QUESTION
    pieces = moved(store, tokens, start=40)
    assert spans(pieces) == [(70, 110, -30), (110, 150, -30)]
    assert [piece.chunk for piece in pieces] == loose
    store.contents.remove(loose[0])
    pieces = moved(store, tokens, start=40)
    assert spans(pieces) == [(110, 150, 110 - 140)] and pieces[0].chunk is not loose[1]


def test_among_very_many_holders_those_behind_the_shared_prompt_are_looked_at(monkeypatch):
    monkeypatch.setattr(matching, "LOOKED_AT", 4)
    monkeypatch.setattr(matching, "PASSED", 8)
    for first in range(2, 30, 9):
        store, system, a = new_store(), text(0), text(1)
        for seed in range(2, 30):
            if seed == first:
                best = store.add(system + a)[-1]
                store.add(system + text(50))
            store.add(text(seed) + a)
        match = store.catalogue.match(store.catalogue.root(NAMESPACE), store.chain(system), 40)
        tokens = system + text(40) + a + QUESTION
        (piece,) = find_moved(store.contents, NAMESPACE, store.chain(tokens), 40, len(tokens), match.chunks)
        assert piece.chunk is best


def test_a_long_run_asks_once_where_it_stands():
    store = new_store()
    document = [token for seed in range(1, 60) for token in text(seed)]
    store.add(text(0) + document)
    tokens = text(99, 30) + document + QUESTION
    chain = store.chain(tokens)
    with counted(ContentIndex, "holders") as asked, counted(matching, "shared_tokens") as compared:
        pieces = find_moved(store.contents, NAMESPACE, chain, 0, len(tokens), ())
    assert len(pieces) == 59 and compared.count <= 59 and asked.count <= len(chain.ends) + 1, "once for each cut"
    assert_true(tokens, 0, len(tokens), pieces)


# Against a matcher that tries everything. Few different words, so that much is equal by chance.
words = st.lists(st.sampled_from([PARAGRAPH, *range(200, 205)]), min_size=1, max_size=70)


def longest_run(tokens, stored):
    """For each position, how many tokens from there on stand side by side somewhere in `stored`."""
    return [
        max((common(tokens[at:], prompt[place:]) for prompt in stored for place in range(len(prompt))), default=0)
        for at in range(len(tokens))
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(words, min_size=1, max_size=5), st.data())
def test_what_is_found_is_true_and_whole_chunks_are_never_missed(parts, data):
    store = new_store()
    orders = st.lists(st.sampled_from(parts), min_size=1, max_size=5).map(joined)
    stored = data.draw(st.lists(orders, min_size=1, max_size=4))
    for tokens in stored:
        store.add(tokens)
    tokens = data.draw(orders)
    start = data.draw(st.integers(0, len(tokens)))
    limit = data.draw(st.integers(start, len(tokens)))
    chain = store.chain(tokens)
    pieces = find_moved(store.contents, NAMESPACE, chain, start, limit, ())
    assert_true(tokens, start, limit, pieces)
    held = {position for piece in pieces for position in range(piece.start, piece.end)}
    for begin, end in pairwise([0, *chain.ends]):
        wanted = tokens[begin:end]
        if any(part(chunk, 0, len(chunk)) == wanted for chunk in list(store.catalogue)):
            assert held.issuperset(range(max(begin, start), min(end, limit)))
    longest = longest_run(tokens, stored)
    assert all(longest[piece.start] >= len(piece) for piece in pieces)
    for piece in pieces:  # behind a run nothing goes on that its own tree holds
        if piece.end < limit and piece.end not in held and piece.ends_chunk:
            children = piece.chunk.children or []
            for child in children if isinstance(children, list) else [children]:
                assert part(child, 0, 1) != tokens[piece.end : piece.end + 1]
        if piece.start > start and piece.start - 1 not in held and not piece.first:
            before = piece.chunk.parent
            assert not before.tokens or part(before, len(before) - 1, 1) != [tokens[piece.start - 1]]


class Words:
    """A tokenizer of words, numbers, marks and white space, for text that has paragraphs like any other."""

    def __init__(self):
        self._ids = {}

    def __call__(self, text):
        pieces = re.findall(r"\n\s*\n|\n| ?[^\W\d_]{1,6}| ?\d{1,2}|\s+?(?=\S)|\S|\s", text)
        return [self._ids.setdefault(piece, len(self._ids)) for piece in pieces]

    def structure(self):
        return TokenStructure.of(self._ids)


def passages(words, filing, size, count, rng):
    """Passages of at least `size` tokens and little more, cut at paragraphs."""
    found, tokens = [], []
    for paragraph in filing.split("\n\n"):
        tokens = tokens + words(paragraph + "\n\n")
        if len(tokens) >= size:
            found.append(tokens)
            tokens = []
    return rng.sample([passage for passage in found if len(passage) < 1.6 * size], count)


@pytest.mark.parametrize("hints", [False, True])
@pytest.mark.parametrize(("size", "least"), [(500, 0.9), (250, 0.8)])
@pytest.mark.parametrize("system", ["Answer from the filings.\n\n", "Answer from the filings. " * 12 + "\n\n"])
def test_passages_of_filings_are_found_in_another_order(size, least, hints, system):
    words, rng = Words(), random.Random(size)
    ours = [passages(words, generate_filing(seed, 4000).text, size, 2, rng) for seed in range(3)]
    system, question = words(system), words("Question: what were net sales in the last year?\nAnswer:")
    store = TokenStore(Chunker(32, 128, 256, words.structure()))
    order = joined(ours)
    for passage in order:
        edges = [len(system), len(system) + len(passage)]
        store.add(system + passage + question, edges if hints else ())
    rng.shuffle(order)
    edges = [len(system)]
    for passage in order:
        edges.append(edges[-1] + len(passage))
    tokens = system + joined(order) + question
    exact, pieces = store.found(tokens, edges if hints else ())
    assert_true(tokens, exact, len(tokens) - 1, pieces)
    share = covered(edges[0], edges[-1], exact, pieces) / (edges[-1] - edges[0])
    assert share >= (0.97 if hints else least), share
