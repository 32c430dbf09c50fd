"""What chunks cost, and which the admission policy lets into memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from ragkv.kvstore import metrics as m
from ragkv.kvstore.keys import TOKEN_BYTES
from ragkv.kvstore.metrics import Metrics
from ragkv.policies.admission import AdmissionPolicy, Always


@dataclass(frozen=True, slots=True)
class Costs:
    """`page_tokens`: of a page. `attention_tokens`: the position at which a token's attention costs as much as its
    other work."""

    page_tokens: int
    attention_tokens: float

    def pages(self, tokens: bytes) -> int:
        """That some tokens take."""
        return -(-len(tokens) // (TOKEN_BYTES * self.page_tokens))

    def work(self, tokens: int, position: int) -> float:
        """To compute so many tokens from a position on. Of a token, 1 and what it attends to (Kaplan et al. 2020,
        "Scaling Laws for Neural Language Models", section 2.1)."""
        return tokens * (1.0 + position / self.attention_tokens)


class Admitting:
    """Asks a policy."""

    def __init__(self, policy: AdmissionPolicy, metrics: Metrics, costs: Costs) -> None:
        self._policy, self._metrics, self._costs = policy, metrics, costs

    @property
    def guarded(self) -> bool:
        """Whether anything may be refused."""
        return not isinstance(self._policy, Always)

    def admits(self, key: bytes, tokens: bytes, position: int) -> bool:
        """Whether a chunk may be kept; a refusal is counted."""
        admitted = self._policy.admit(
            key, self._costs.pages(tokens), self._costs.work(len(tokens) // TOKEN_BYTES, position)
        )
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
