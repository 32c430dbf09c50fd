"""How good a short answer is: exact match and F1 over words, with intervals by the bootstrap.

As SQuAD scores answers (Rajpurkar et al., EMNLP 2016): lower case, without punctuation and articles, the best of
several known answers. Beyond that numbers are compared by value: "$1,234 million" is "1234", and "3.50" is "3.5".
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
STATISTICS: dict[str, Callable[..., Any]] = {"mean": np.mean, "median": np.median}
_ARTICLES = {"a", "an", "the"}
_UNITS = {"million", "millions", "dollar", "dollars", "usd", "percent"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_PARTS = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?|\w+")
_WITHIN_WORDS = re.compile(r"(?<=[^\W\d])['\u2019.](?=[^\W\d])")  # of U.S. and company's


def normalize(text: str) -> list[str]:
    """The words and numbers that are compared. Units that questions name (dollars, millions, percent) are none."""
    plain = text.lower().replace("\N{MINUS SIGN}", "-").replace("-$", "-").replace("$", "")
    plain = _WITHIN_WORDS.sub("", _THOUSANDS.sub("", plain))
    return [_value(part) for part in _PARTS.findall(plain) if part not in _ARTICLES | _UNITS]


def exact_match(answer: str, known: Sequence[str]) -> float:
    """1.0 where the answer is one of the known ones, else 0.0."""
    words = normalize(answer)
    return float(any(words == normalize(each) for each in known))


def f1(answer: str, known: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words, against the known answer where it is best."""
    return max((_f1(normalize(answer), normalize(each)) for each in known), default=0.0)


def interval(
    values: Sequence[float], statistic: str = "mean", *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of a statistic ("mean" or "median") of one value a question: the bootstrap's percentiles
    (Efron and Tibshirani 1993, chapter 13).

    Given the differences of two systems question by question it is the paired bootstrap (Koehn, EMNLP 2004). The
    same seed and number of values draw the same samples. ValueError: no value, or an unknown statistic.
    """
    if not len(values):
        raise ValueError("values: expected at least one")
    if statistic not in STATISTICS:
        raise ValueError(f"statistic = {statistic!r}; allowed: {', '.join(STATISTICS)}")
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(resamples, len(numbers)))
    found = STATISTICS[statistic](numbers[drawn], axis=1)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _f1(answer: list[str], known: list[str]) -> float:
    if not answer or not known:
        return float(answer == known)
    common = (Counter(answer) & Counter(known)).total()
    return 2 * common / (len(answer) + len(known))


def _value(part: str) -> str:
    """A number without zeros that do not count; a word as it is."""
    if not re.fullmatch(r"-?\d+(\.\d+)?", part, re.ASCII):
        return part
    number = format(Decimal(part), "f")
    return number.rstrip("0").rstrip(".") if "." in number else str(int(number))
