"""The plan of a fusion: what is moved, what is recomputed; what does not pay is declined with the figures."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ragkv.kvstore.fusion.matching import Piece
from ragkv.kvstore.fusion.plan import (
    DECLINED,
    KINDS,
    MISSING,
    MOVED,
    REUSED,
    TOO_SHORT,
    UNSUPPORTED,
    Declined,
    Plan,
    decisions,
    make_plan,
    runs_of,
)
from ragkv.kvstore.gate import BELIEF, FIRST, PROBE, Gate
from ragkv.kvstore.prefix_tree import Chunk

CHUNK = Chunk(b"", None, b"")


def piece(start, end, shift=7):
    return Piece(start, end, CHUNK, 0, shift)


def gate(prefill=0.001, copy=None, fuse=None, active=True):
    """A gate that has seen each cost as seconds a token; `fuse`: fixed seconds, and a token."""
    made = Gate(active=active)
    for amount in (15, 100, 150, 1000, 1150, 3000, 6000, 12000) * BELIEF:
        if prefill is not None:
            made.prefill.note(amount, prefill * amount)
        if copy is not None:
            made.copy.note(amount, copy * amount)
        if fuse is not None:
            made.fuse.note(amount, fuse[0] + fuse[1] * amount)
    return made


def plan(pieces, exact=0, limit=10**6, ratio=0.15, min_tokens=1, scoring=0.0, by=None):
    return make_plan(pieces, exact, limit, ratio, min_tokens, scoring, by or Gate())


@st.composite
def layouts(draw):
    """(exact, pieces, limit): ascending, disjoint pieces, some side by side."""
    position = exact = draw(st.integers(0, 20))
    pieces = []
    for _ in range(draw(st.integers(0, 8))):
        position += draw(st.sampled_from([0, 0, 1, 5, 40]))
        end = position + draw(st.integers(1, 30))
        pieces.append(piece(position, end, draw(st.integers(0, 2))))
        position = end
    return exact, pieces, position + draw(st.integers(0, 5))


@given(layouts(), st.floats(0, 1), st.integers(1, 30), st.sampled_from([0.0, 0.1, 0.7]), st.booleans())
def test_every_token_has_one_fate(layout, ratio, min_tokens, scoring, judges):
    exact, pieces, limit = layout
    known = gate() if judges else Gate()
    made = make_plan(pieces, exact, limit, ratio, min_tokens, scoring, known)
    runs = runs_of(pieces)
    if isinstance(made, Declined):
        assert made.kind in KINDS and made.reason
        assert judges or all(end - start < min_tokens for start, end in runs)
        return
    kept = {token for each in made.pieces for token in range(each.start, each.end)}
    gaps = set(range(made.exact, made.end)) - kept
    assert made.exact == exact and not kept - set(range(made.exact, made.end))
    assert made.moved == len(kept) and made.end in kept | {max(kept) + 1} and made.end <= limit
    long = {(start, end) for start, end in runs if end - start >= min_tokens and end <= made.end}
    assert set(runs_of(made.pieces)) == long
    assert {*made.short} == {p for p in pieces if any(a <= p.start < b and b - a < min_tokens for a, b in runs)}
    assert made.work == pytest.approx(len(gaps) + made.budget + scoring * (made.end - exact))
    assert 0 <= made.budget - ratio * made.moved + 1e-6 < 1 + 1e-6


def test_pieces_beyond_the_bounds_are_refused():
    for wrong in ([piece(4, 9)], [piece(5, 21)]):
        with pytest.raises(ValueError, match="not in 5 to 20"):
            plan(wrong, exact=5, limit=20)


def test_pieces_side_by_side_are_one_run_if_they_move_alike():
    pieces = [piece(0, 5, 1), piece(5, 9, 1), piece(9, 12, 2), piece(13, 20, 2)]
    assert runs_of(pieces) == [(0, 9), (9, 12), (13, 20)] and runs_of([]) == []


@pytest.mark.parametrize(
    ("ratio", "moved", "budget"), [(0, 100, 0), (1, 100, 100), (0.15, 100, 15), (0.07, 100, 7), (0.15, 101, 16)]
)
def test_the_budget_is_rounded_up(ratio, moved, budget):
    assert plan([piece(0, moved)], ratio=ratio).budget == budget


def test_runs_that_are_short_are_left_out_and_their_tokens_are_a_gap():
    made = plan([piece(0, 50), piece(60, 70), piece(90, 140), piece(150, 155)], min_tokens=20)
    assert made.pieces == (piece(0, 50), piece(90, 140)) and made.end == 140
    assert made.short == (piece(60, 70), piece(150, 155))
    nothing = plan([piece(60, 70), piece(150, 155)], min_tokens=20)
    assert nothing.kind == TOO_SHORT and "10 tokens" in nothing.reason and "20" in nothing.reason
    assert plan([]).kind == MISSING


def test_short_pieces_of_one_run_are_kept_together():
    assert plan([piece(0, 6), piece(6, 12)], min_tokens=12).moved == 12
    assert plan([piece(0, 6, 1), piece(6, 12, 2)], min_tokens=12).kind == TOO_SHORT


def test_what_takes_longer_than_prefill_is_declined_with_the_figures():
    moved = [piece(0, 1000)]
    assert isinstance(plan(moved, by=gate()), Plan)
    assert isinstance(plan(moved, by=gate(copy=0.0008)), Plan)  # 150 + 800 ms against 1000
    slow = plan(moved, by=gate(copy=0.0009))
    assert slow.kind == DECLINED
    assert "1050.0 ms" in slow.reason and "1000.0 ms" in slow.reason and "work of 150" in slow.reason
    assert plan(moved, ratio=1.0, by=gate()).kind == DECLINED
    assert plan(moved, scoring=0.9, by=gate()).kind == DECLINED


def test_measured_fusions_count_more_than_what_they_should_cost():
    moved = [piece(0, 1000)]
    assert plan(moved, by=gate(fuse=(0.9, 0.001))).kind == DECLINED
    assert isinstance(plan(moved, by=gate(copy=0.0005, fuse=(0.1, 0.001))), Plan)
    assert plan(moved, by=gate(copy=0.0009, fuse=(0.1, 0.001))).kind == DECLINED, "the copies are no part of it"


def test_where_nothing_is_judged_all_is_planned():
    moved = [piece(0, 100), piece(5000, 5100)]
    for by in (Gate(), gate(copy=1.0, active=False), gate(prefill=None, copy=1.0)):
        made = plan(moved, ratio=1.0, scoring=1.0, by=by)
        assert made.end == 5100 and made.budget == 200


def test_now_and_then_a_declined_plan_is_tried():
    by = gate(fuse=(0.5, 0.001))

    def tried(times):
        return [isinstance(plan([piece(0, 100)], by=by), Plan) for _ in range(times)]

    assert tried(FIRST + 1 + PROBE) == [*[False] * FIRST, True, *[False] * (PROBE - 1), True]
    assert not any(tried(10))
    assert isinstance(plan([piece(0, 5000)], by=by), Plan)  # says nothing of short ones
    assert tried(PROBE - 10) == [*[False] * (PROBE - 11), True]


def test_the_plan_ends_where_it_saves_the_most():
    pieces = [piece(0, 500), piece(600, 1100), piece(9000, 9060)]
    assert plan(pieces, by=gate()).end == 9060  # a gap costs the same, whoever computes it
    assert plan(pieces, scoring=0.05, by=gate()).end == 1100  # but must be looked at too: 400 for 51
    assert plan([*pieces, piece(9100, 12000)], scoring=0.05, by=gate()).end == 12000
    assert plan([*pieces, piece(9100, 12000)], scoring=0.05, by=gate(fuse=(0.1, 0.002))).end == 1100


def test_a_decision_for_every_document():
    pieces = [piece(100, 300, 40), piece(300, 400, 10), piece(420, 430, 3), piece(5000, 5100, 0)]
    made = plan(pieces, exact=90, min_tokens=20, scoring=0.05, by=gate())
    assert made.end == 400
    documents = [
        ("exact", 10, 60),
        ("mixed", 80, 110),
        ("mostly exact", 50, 105),
        ("moved", 100, 410),
        ("second", 290, 400),
        ("short", 410, 440),
        ("nowhere", 3000, 4000),
        ("late", 4990, 5100),
    ]
    found = {each.id: each for each in decisions(documents, 90, pieces, made)}
    assert {name: (each.kind, each.by, each.reused_tokens) for name, each in found.items()} == {
        "exact": (REUSED, 0, 50),
        "mixed": (REUSED, 0, 20),
        "mostly exact": (REUSED, 0, 45),
        "moved": (MOVED, 40, 300),
        "second": (MOVED, 10, 110),
        "short": (TOO_SHORT, 0, 0),
        "nowhere": (MISSING, 0, 0),
        "late": (DECLINED, 0, 0),
    }
    assert "400" in found["late"].reason and not found["moved"].reason
    assert found["moved"].as_dict() == {
        "id": "moved",
        "start": 100,
        "end": 410,
        "decision": "moved",
        "by": 40,
        "reused_tokens": 300,
    }


def test_decisions_where_nothing_is_fused():
    pieces, documents = [piece(100, 300)], [("a", 0, 50), ("b", 90, 310), ("c", 400, 500)]

    def kinds(outcome):
        return [(each.id, each.kind, each.reason) for each in decisions(documents, 50, pieces, outcome)]

    declined = Declined(DECLINED, "too slow")
    assert kinds(declined) == [("a", REUSED, ""), ("b", DECLINED, "too slow"), ("c", MISSING, "")]
    refused = Declined(UNSUPPORTED, "no rotary positions")
    assert [kind for _, kind, _ in kinds(refused)] == [REUSED, UNSUPPORTED, UNSUPPORTED]
    assert decisions(documents, 50, (), refused)[1].as_dict()["reason"] == "no rotary positions"
    assert [kind for _, kind, _ in kinds(plan(pieces, exact=50, min_tokens=201))] == [REUSED, TOO_SHORT, MISSING]


def test_without_documents_the_runs_found_are_decided():
    pieces = [piece(10, 20, 3), piece(20, 30, 3), piece(30, 34, 1)]
    found = decisions((), 5, pieces, plan(pieces, exact=5, min_tokens=5))
    assert [(each.id, each.start, each.end, each.kind, each.by) for each in found] == [
        ("", 10, 30, MOVED, 3),
        ("", 30, 34, TOO_SHORT, 0),
    ]
    assert decisions((), 5, (), plan([])) == []


def test_work_is_what_is_computed():
    made = plan([piece(10, 110), piece(150, 250)], exact=0, ratio=0.1, scoring=0.5)
    assert made.work == 50 + 20 + 0.5 * 250 and made.moved == 200
