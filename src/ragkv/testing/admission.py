"""The suite of admission policies: the contract.

class TestOften(AdmissionTests):
    def make(self):
        return Often(remembered=500)
"""

import tracemalloc
from collections.abc import Callable, Hashable

import pytest

from ragkv.policies.admission import AdmissionPolicy
from ragkv.testing.salted import salted


class Named:
    """Compared by identity, as chunks are."""

    def __init__(self, key: bytes) -> None:
        self.key = key


def key_of(number: int) -> bytes:
    """A key of 16 bytes."""
    return b"%016d" % number


def answers(admission: AdmissionPolicy, make_key: Callable[[int], Hashable]) -> list[bool]:
    """What a policy says under a fixed sequence of questions about such keys."""
    numbers = [number * number % 997 if number % 2 else number % 701 for number in range(4000)]
    return [admission.admit(make_key(each), 1 + at % 5, 1.0 + at % 7) for at, each in enumerate(numbers)]


class AdmissionTests:
    """Every admission policy passes these. `make` is all that a subclass owes."""

    def make(self) -> AdmissionPolicy:
        """A new policy, that remembers at most some hundred keys: a small one shows whether memory is bounded."""
        raise NotImplementedError

    @pytest.mark.parametrize("make_key", [key_of, str, int], ids=["bytes", "str", "int"])
    def test_every_kind_of_key(self, make_key: Callable[[int], Hashable]) -> None:
        assert set(answers(self.make(), make_key)) <= {True, False}

    def test_an_object_stands_for_its_key(self) -> None:
        assert answers(self.make(), lambda number: Named(key_of(number))) == answers(self.make(), key_of)

    def test_answers_do_not_depend_on_hashes(self) -> None:
        """Hashes of bytes and str differ from process to process, and answers must not."""
        first, second = (
            answers(self.make(), lambda number, salt=salt: salted(number, salt))  # type: ignore[misc]
            for salt in (1, 2)
        )
        assert first == second

    def test_memory_is_bounded(self) -> None:
        admission = self.make()
        tracemalloc.start()
        try:
            for number in range(2000):
                admission.admit(key_of(number))
            before = tracemalloc.get_traced_memory()[0]
            for number in range(2000, 8000):
                admission.admit(key_of(number))
            after = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert after < before + 50_000, "6,000 more keys were asked about, and something was kept of them"
