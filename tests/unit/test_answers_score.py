"""Exact match, F1 and bootstrap intervals of `bench answers`."""

import pytest

from ragkv.benchmarks.internal.answers_score import exact_match, f1, interval, normalize


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("$1,234 million.", ["1234"]),
        ("1234.00", ["1234"]),
        ("3.50 dollars", ["3.5"]),
        ("12,345,678", ["12345678"]),
        ("1,2", ["1", "2"]),
        ("-$12", ["-12"]),
        ("\N{MINUS SIGN}12", ["-12"]),
        ("(12)", ["12"]),
        ("12%", ["12"]),
        ("007", ["7"]),
        ("fiscal-2022", ["fiscal", "2022"]),
        ("The Flow-Control, a segment", ["flow", "control", "segment"]),
        ("U.S. company's", ["us", "companys"]),
        ("Q4", ["q4"]),
        (" ", []),
    ],
)
def test_numbers_are_compared_by_value_and_words_without_punctuation(text, words):
    assert normalize(text) == words


def test_exact_match_is_with_one_of_the_known_answers():
    assert exact_match("$1,234 million", ["12", "1234"]) == 1
    assert exact_match("1,235", ["1234"]) == exact_match("1234 in 2022", ["1234"]) == exact_match("", ["1"]) == 0
    assert exact_match("1.234", ["1,234"]) == 0


def test_f1_is_that_of_the_best_known_answer():
    assert f1("Net sales were $1,234 million", ["1234"]) == pytest.approx(2 / (4 + 1))
    assert f1("the cat sat", ["a cat sat down", "dog"]) == pytest.approx(2 * 2 / (2 + 3))
    assert f1("cat cat", ["cat"]) == pytest.approx(2 / 3), "a word counts as often as both have it"
    assert f1("", ["cat"]) == f1("dog", ["cat"]) == 0
    assert f1("...", ["the"]) == 1


def test_intervals_are_the_same_each_time_and_hold_what_they_should():
    values = [0.0, 1.0] * 50
    low, high = interval(values)
    assert (low, high) == interval(values)
    assert interval(values, resamples=20) != interval(values, resamples=20, seed=1)
    assert 0.38 < low < 0.42 and 0.58 < high < 0.62, "half, with a standard error of 0.05"
    assert interval([0.25] * 7) == (0.25, 0.25)
    assert interval([3.0]) == (3, 3)
    low, high = interval([1.0] * 98 + [1000.0] * 2, "median")
    assert (low, high) == (1, 1)


def test_paired_differences_have_narrower_intervals():
    one = [float(n % 2) for n in range(100)]
    other = [value if n % 10 else 1 - value for n, value in enumerate(one)]
    low, high = interval([a - b for a, b in zip(one, other, strict=True)])
    alone = interval(one)
    assert high - low < alone[1] - alone[0]


def test_what_has_no_interval_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        interval([])
    with pytest.raises(ValueError, match=r"statistic = 'mode'; allowed: mean, median"):
        interval([1.0], "mode")
