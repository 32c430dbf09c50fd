"""Hints of requests: what is read, and what is said of what is wrong."""

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from ragkv.config.settings import HINT_NAMES as ALLOWED
from ragkv.config.settings import SELECTION_NAMES
from ragkv.connectors.vllm.hints import (
    LAST,
    LONGEST,
    LONGEST_PIN,
    MOST_DOCUMENTS,
    MOST_ORDERED_TOKENS,
    MOST_PASSAGES,
    NO_HINTS,
    Document,
    Hints,
    Pin,
)
from ragkv.connectors.vllm.hints import read_hints as read_all

DOCUMENTS = [{"id": "a", "start": 0, "end": 40}, {"id": "b", "start": 40, "end": 90}, {"start": 90, "end": 100}]


def read_hints(params, **more):
    """The hints, and the only problem, if any."""
    hints = read_all(params, **more)
    assert len(hints.problems) <= 1
    return hints, hints.problems[0] if hints.problems else None


def read(**hints):
    return read_hints({"ragkv": hints})


@pytest.mark.parametrize(
    "params",
    [None, {}, {"ragkv": None}, {"ragkv": {}}, {"other": 1}, {"ragkv": {"documents": []}}, [], "ragkv", 7],
)
def test_no_hints_are_no_problem(params):
    assert read_hints(params) == (NO_HINTS, None)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_hint_of_null_is_no_hint(name):
    assert read(**{name: None}) == (NO_HINTS, None)


def test_documents_name_both_their_ends_once_and_never_the_start_of_the_prompt():
    spans = [
        {"id": "b", "start": 40, "end": 90},
        {"start": 0, "end": 40},
        {"start": 10, "end": 90, "id": None},
    ]
    hints, problem = read(documents=spans)
    assert hints.boundaries == (10, 40, 90) and problem is None
    assert hints.documents == (Document("b", 40, 90), Document("", 0, 40), Document("", 10, 90))


def test_all_hints_at_once():
    pin = {"owner": "desk 7", "seconds": 3600, "documents": ["a"]}
    fusion = {"fuse": True, "recompute_ratio": 0.3, "selection": "query"}
    hints, problem = read(documents=DOCUMENTS, pin=pin, unpin={"owner": "desk 6"}, ttl=0.5, priority=9, **fusion)
    assert problem is None and hints.given and hints.boundaries == (40, 90, 100)
    documents = tuple(Document(each.get("id", ""), each["start"], each["end"]) for each in DOCUMENTS)
    assert hints == Hints(documents, Pin("desk 7", 3600.0, 40), "desk 6", 0.5, 9, True, 0.3, "query")


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 0.15])
def test_a_request_may_say_how_to_fuse(fuse, ratio):
    hints, problem = read(fuse=fuse, recompute_ratio=ratio)
    assert (hints.fuse, hints.recompute_ratio, hints.selection, problem) == (fuse, ratio, None, None)


@pytest.mark.parametrize(
    ("named", "end"), [(["a"], 40), (["a", "b"], 90), (["b", "a"], 90), (["b", "b"], 90), ([], None)]
)
def test_a_pin_reaches_to_the_end_of_the_last_document_it_names(named, end):
    hints, problem = read(documents=DOCUMENTS, pin={"owner": "x", "seconds": 1, "documents": named})
    assert (hints.pin, problem) == (Pin("x", 1.0, end), None)


def test_a_pin_without_documents_is_of_the_whole_prompt():
    assert read(pin={"owner": "x", "seconds": 2.5}) == (Hints(pin=Pin("x", 2.5, None)), None)


BAD_PINS = [LONGEST_PIN + 1, 3e9]
BAD_TIMES = [0, -1, True, "60", float("nan"), float("inf"), LONGEST + 1, 10**400, [1], {}]
BAD_OWNERS = [None, "", 7, True, "x" * 201, ["x"]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("documents", value)
            for value in (
                7,
                "a",
                {"start": 1, "end": 2},
                [3],
                [None],
                [{}],
                [{"start": 1}],
                [{"start": 5, "end": 5}],
                [{"start": -1, "end": 5}],
                [{"start": 1.0, "end": 5}],
                [{"start": "1", "end": "5"}],
                [{"start": False, "end": True}],
                [{"start": 1, "end": LAST + 1}],
                [{"start": 1, "end": 5}, {"start": 9, "end": 2}],
            )
        ),
        *(("pin", value) for value in (7, "x", [], {}, {"owner": "x"}, {"seconds": 1})),
        *(("pin", {"owner": "x", "seconds": value}) for value in BAD_TIMES + BAD_PINS),
        *(("pin", {"owner": value, "seconds": 1}) for value in BAD_OWNERS),
        *(("pin", {"owner": "x", "seconds": 1, "documents": value}) for value in (None, "a", ["a"], [7], [["a"]])),
        ("pin", {"owner": "x", "seconds": 1, "until": 7}),
        *(("unpin", value) for value in (7, "x", [], {}, {"owner": "x", "seconds": 1})),
        *(("unpin", {"owner": value}) for value in BAD_OWNERS),
        *(("ttl", value) for value in BAD_TIMES),
        *(("priority", value) for value in (-1, 10, 1.0, True, "1", [1], 10**400)),
        *((name, value) for name in ("fuse", "store") for value in (0, 1, "yes", [True])),
        *(("recompute_ratio", value) for value in (-0.1, 1.1, True, "1", float("nan"), 10**400)),
        *(("selection", value) for value in ("best", "", 1, ["query"])),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_a_malformed_hint_counts_for_nothing_and_is_told(name, value):
    good = {"documents": [{"id": "b", "start": 2, "end": 5}], "ttl": 7, "priority": 3}
    hints, problem = read(**{**good, name: value})
    expected = {"documents": (Document("b", 2, 5),), "ttl": 7, "priority": 3} | {
        "documents": {"documents": ()},
        "ttl": {"ttl": None},
        "priority": {"priority": 0},
        "store": {"store": False},
    }.get(name, {})
    assert hints == Hints(**expected)
    assert problem.startswith(f"ragkv.{name} = ") and "; allowed: " in problem and len(problem) < 300


@pytest.mark.parametrize("hints", [7, "documents", [], True, 10**400])
def test_hints_are_a_mapping(hints):
    found, problem = read_hints({"ragkv": hints})
    assert found == NO_HINTS
    assert problem.startswith("ragkv = ") and problem.endswith(f"allowed: a mapping with {', '.join(ALLOWED)}")


@pytest.mark.parametrize("unknown", ["fuze", 3, None, ("a", "b")])
def test_an_unknown_hint_is_told_and_the_known_ones_hold(unknown):
    hints, problem = read_hints({"ragkv": {unknown: 1, "documents": [{"start": 2, "end": 5}]}})
    assert hints == Hints((Document("", 2, 5),))
    assert problem.startswith("ragkv.") and problem.endswith(f": unknown; allowed: {', '.join(ALLOWED)}")
    assert str(unknown)[:4] in problem


def test_numbers_that_python_would_not_print_are_told():
    """From 4301 digits on; a program that calls the engine may give them."""
    huge = 10**5000
    assert read_hints({"ragkv": huge})[1].startswith("ragkv = <int>; allowed: ")
    assert read(ttl=huge)[1].startswith("ragkv.ttl = <int>; allowed: seconds")
    assert "unknown" in read_hints({"ragkv": {huge: 1}})[1]
    assert "ragkv.documents = " in read(documents=[{"start": 1, "end": huge}])[1]


def test_all_problems_are_told():
    hints = read_all({"ragkv": {"fuze": 1, "ttl": -1, "priority": 77, "fuse": "yes", "turn": 2}})
    assert hints == Hints(turn=2)
    named = [problem.partition(";")[0] for problem in hints.problems]
    assert named == ["ragkv.'fuze': unknown", "ragkv.fuse = 'yes'", "ragkv.ttl = -1", "ragkv.priority = 77"]


def test_of_many_unknown_hints_some_are_named():
    names = [f"hint {number}" for number in range(9)]
    problem = read_hints({"ragkv": dict.fromkeys(names[:5], 1)})[1]
    assert all(name in problem for name in names[:5]) and "..." not in problem
    problem = read_hints({"ragkv": dict.fromkeys(names, 1)})[1]
    assert "hint 4" in problem and "hint 5" not in problem and ", ...: unknown" in problem


def test_kinds_that_are_not_allowed_do_not_count():
    given = {"fuse": True, "store": False, "pin": {"owner": "x", "seconds": 1}, "turn": 2, "ttl": "bad"}
    hints = read_all({"ragkv": given}, allow={"turn", "pin"})
    assert hints == Hints(pin=Pin("x", 1.0), turn=2)
    said = "not allowed here; hints.allow = pin, turn"
    assert hints.problems == tuple(f"ragkv.{name}: {said}" for name in ("fuse", "store", "ttl"))
    assert read_all({"ragkv": given}, allow=()).problems[0].endswith("hints.allow = none")


def test_the_first_documents_count():
    spans = [{"id": str(number), "start": number, "end": number + 1} for number in range(3400)]
    hints, problem = read(documents=spans, ttl=5)
    assert hints.documents == tuple(Document(str(n), n, n + 1) for n in range(MOST_DOCUMENTS)) and hints.ttl == 5
    assert problem == f"ragkv.documents: 3400 of them; the first {MOST_DOCUMENTS} count"
    hints, problem = read(documents=spans[:MOST_DOCUMENTS])
    assert len(hints.documents) == MOST_DOCUMENTS and problem is None


class Endless(list):
    """A list of very many values, of which only the first thousand may be looked at."""

    def __len__(self):
        return 10**9

    def __iter__(self):
        raise AssertionError("it looks at all")

    def __getitem__(self, place):
        assert place.stop <= 1000
        return [super().__getitem__(0)] * place.stop


def test_of_endless_documents_only_the_beginning_is_looked_at():
    hints, problem = read(documents=Endless([{"start": 1, "end": 2}]))
    assert len(hints.documents) == MOST_DOCUMENTS and problem.endswith("count")


@pytest.mark.parametrize("pin", [{"documents": ["a"] * 10**5}, dict.fromkeys(map(str, range(10**5)))])
def test_a_pin_of_very_many_parts_is_none(pin):
    hints, problem = read(documents=DOCUMENTS, pin={"owner": "x", "seconds": 1, **pin})
    assert hints.pin is None and problem.startswith("ragkv.pin = ")


def test_what_is_said_of_a_huge_hint_is_short():
    deep = ["x" * 10**4] * 10
    for _ in range(5):
        deep = [deep] * 6
    for hints in ("x" * 10**6, {"documents": ["x" * 10**6] * 100}, {"y" * 10**6: 1}, {"documents": deep}, deep):
        assert len(read_hints({"ragkv": hints})[1]) < 300


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(10**400)
    | st.sampled_from(["a", "x"]),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(max_size=20) | st.sampled_from(["owner", "seconds", "documents", "id", "start", "end"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=40,
)
spans = st.fixed_dictionaries({"start": st.integers(-1, 9), "end": st.integers(0, 99)}, optional={"id": json_like})
pins = st.fixed_dictionaries(
    {"owner": st.just("x") | json_like, "seconds": st.integers(0, 9) | json_like},
    optional={"documents": st.lists(st.text("ab", max_size=1)) | json_like, "more": json_like},
)
near_hints = st.fixed_dictionaries(
    {},
    optional={
        "documents": st.lists(spans) | json_like,
        "pin": pins | json_like,
        "unpin": st.fixed_dictionaries({"owner": st.text()}) | json_like,
        "ttl": st.floats() | json_like,
        "priority": st.integers(-2, 12) | json_like,
        "fuse": st.booleans() | json_like,
        "store": st.booleans() | json_like,
        "recompute_ratio": st.floats(-1, 2) | json_like,
        "selection": st.sampled_from(["query", "deviation"]) | json_like,
        "other": json_like,
    },
)


@settings(max_examples=300, deadline=None)
@given(json_like | st.fixed_dictionaries({"ragkv": json_like | near_hints}))
def test_whatever_comes_is_read(params):
    hints = read_all(params)
    assert isinstance(hints, Hints)
    assert list(hints.boundaries) == sorted(set(hints.boundaries)) and 0 not in hints.boundaries
    assert hints.pin is None or (0 < hints.pin.seconds <= LONGEST_PIN and 0 < len(hints.pin.owner) <= 200)
    assert hints.ttl is None or 0 < hints.ttl <= LONGEST
    assert 0 <= hints.priority <= 9
    assert hints.fuse in (None, True, False) and hints.selection in (None, *SELECTION_NAMES)
    assert hints.recompute_ratio is None or 0 <= hints.recompute_ratio <= 1
    if not hints.problems:
        given_names = {name for name, value in (given_hints(params)).items() if value is not None}
        assert given_names <= set(ALLOWED)
    for problem in hints.problems:
        assert problem.startswith("ragkv") and "allowed: " in problem and len(problem) < 1000
        assert problem.isprintable()


def given_hints(params):
    hints = params.get("ragkv") if isinstance(params, dict) else None
    return {} if hints is None else hints


def test_the_example_of_the_docstring_holds():
    import ragkv.connectors.vllm.hints as module

    text = module.__doc__[module.__doc__.index("{") : module.__doc__.rindex("}") + 1]
    hints, problem = read_hints(json.loads(text))
    assert problem is None
    document = Document("10-K 2023", 12, 3012)
    pin = Pin("desk 7", 3600.0, 3012)
    assert hints == Hints((document,), pin, "desk 6", 86400, 1, True, 0.15, "query", 2)


def test_an_order_of_passages_is_of_token_ids():
    hints, problem = read(order={"before": [1, 2], "passages": [[3], [4, 5]]})
    assert problem is None and hints.given
    assert [each.tolist() for each in (hints.order.before, *hints.order.passages)] == [[1, 2], [3], [4, 5]]
    assert read(order={"passages": [[7]]})[0].order.before.tolist() == []


@pytest.mark.parametrize(
    "order",
    [
        {},
        {"passages": []},
        {"passages": [[]]},
        {"passages": [1, 2]},
        {"passages": [[1], ["2"]]},
        {"passages": [[True]]},
        {"passages": [[-1]]},
        {"passages": [[LAST + 1]]},
        {"passages": [[1]], "before": "text"},
        {"passages": [[1]], "behind": [2]},
        {"passages": [[1]] * (MOST_PASSAGES + 1)},
        {"passages": [[1] * MOST_ORDERED_TOKENS, [2]]},
        {"passages": [["x"] * MOST_ORDERED_TOKENS]},
        {"passages": "text"},
        {"passages": {"a": [1]}},
        [[1], [2]],
    ],
    ids=lambda order: str(order)[:40],
)
def test_an_order_that_is_none_is_a_problem(order):
    hints, problem = read(order=order)
    assert hints.order is None and problem.startswith("ragkv.order = ") and "1 to 64 lists of token ids" in problem
    assert len(problem) < 400
