"""Which chunks the admission policy lets into memory."""

from collections.abc import Callable, Sequence

from ragkv.kvstore import metrics as m
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.metrics import Metrics
from ragkv.policies.admission import AdmissionPolicy, Always


class Admitting:
    """Asks a policy. `pages`: that some tokens take; `work`: to compute them, from a position on."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        metrics: Metrics,
        pages: Callable[[bytes], int],
        work: Callable[[bytes, int], float],
    ) -> None:
        self._policy, self._metrics, self._pages, self._work = policy, metrics, pages, work

    @property
    def guarded(self) -> bool:
        """Whether anything may be refused."""
        return not isinstance(self._policy, Always)

    def admits(self, key: bytes, tokens: bytes, position: int) -> bool:
        """Whether a chunk may be kept; a refusal is counted."""
        admitted = self._policy.admit(key, self._pages(tokens), self._work(tokens, position))
        if not admitted:
            self._metrics.count(m.REFUSED_CHUNKS, reason=m.ADMISSION)
        return admitted

    def see(self, cuts: Sequence[tuple[int, bytes]], raw: bytes, start: int) -> None:
        """Ask the policy about the chunks after one that it declined, from token `start` on. They cannot be kept
        now; but if the policy did not count them, each request would get one chunk further only."""
        for end, key in cuts:
            if end > start:
                self.admits(key, raw[TOKEN_BYTES * start : TOKEN_BYTES * end], start)
                start = end
