"""What a shell may complete: names that we know, also as the last of a list with commas."""

from collections.abc import Callable, Iterable

from ragkv.benchmarks.compared import COMPARED
from ragkv.policies import ADMISSIONS

Completer = Callable[[str], list[str]]


def one_of(names: Iterable[str]) -> Completer:
    """Completes a name."""
    known = sorted(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


def some_of(names: Iterable[str]) -> Completer:
    """Completes the last of several names, with those before it kept, and none offered twice."""
    known = sorted(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [before + comma + name for name in known if name.startswith(last) and name not in before.split(",")]

    return complete


policies = some_of(COMPARED)
admissions = some_of(ADMISSIONS)
