"""What `internal fusion` keeps of an engine's logits, and how two such records are compared."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate

from ragkv.benchmarks.internal import fusion_measure, fusion_quality
from ragkv.benchmarks.internal.fusion_quality import RECORDS, Divergence, Forced, compare, divergence, forget

logits = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)


@given(st.lists(st.tuples(logits, logits, st.integers(0, 4)), min_size=1, max_size=4))
def test_divergence_is_what_torch_says(positions):
    full, other = (torch.tensor([each[n] for each in positions]).log_softmax(-1) for n in (0, 1))
    tokens = [each[2] for each in positions]
    found = divergence(full, other, tokens)
    expected = torch.nn.functional.kl_div(other.double(), full.double(), log_target=True, reduction="none").sum(-1)
    assert torch.tensor(found.kl).double() == pytest.approx(expected, abs=1e-5)
    assert found.top1 == [bool(a == b) for a, b in zip(full.argmax(-1), other.argmax(-1), strict=True)]
    for n, token in enumerate(tokens):
        assert found.delta_nll[n] == pytest.approx(float(full[n, token] - other[n, token]), abs=1e-5)
    same = divergence(full, full, tokens)
    assert same == Divergence([0.0] * len(tokens), [True] * len(tokens), [0.0] * len(tokens))


def test_divergence_has_a_direction_and_forgives_impossible_tokens():
    half, sure = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert divergence(sure, half, [0]).kl == pytest.approx([math.log(2)])
    assert divergence(half, sure, [0]).kl == [math.inf]
    assert divergence(sure, half, [0]).delta_nll == pytest.approx([math.log(2)])


class Batch:
    """A processor, and the requests it is told of."""

    def __init__(self, *requests):
        forget(None)
        self.processor = Forced(None, torch.device("cpu"), False)
        self.given = [[] for _ in requests]
        added = [
            (row, SamplingParams(extra_args=extra), [7], given)
            for row, (extra, given) in enumerate(zip(requests, self.given, strict=True))
        ]
        self.processor.update_state(BatchUpdate(len(requests), [], added, []))

    def step(self, logits):
        """Tokens sampled greedily from raw logits, a row a request; they are given only by the caller."""
        self.processor.update_state(None)
        return self.processor.apply(logits.clone()).argmax(-1).tolist()


def force(key, *tokens):
    return {fusion_quality.FORCE: list(tokens), fusion_quality.KEY: key}


def test_tokens_are_forced_and_the_raw_logits_kept():
    batch = Batch(None, force("full", 3, 1), {"other": 1})
    rows = [torch.randn(3, 5) for _ in range(3)]
    for n, raw in enumerate(rows):
        sampled = batch.step(raw)
        plain = raw.argmax(-1).tolist()
        assert (sampled[0], sampled[2]) == (plain[0], plain[2])
        assert sampled[1] == ([3, 1][n] if n < 2 else plain[1])
        for tokens in batch.given:
            tokens.append(-1)  # a placeholder: asynchronous scheduling
    assert list(RECORDS) == ["full"]
    assert [torch.allclose(RECORDS["full"][n], rows[n][1].log_softmax(-1)) for n in (0, 1)] == [True, True]
    assert sorted(RECORDS["full"]) == [0, 1]


def test_of_a_prompt_in_several_steps_the_last_counts():
    batch = Batch(force("full", 3))
    rows = [torch.randn(1, 5) for _ in range(3)]
    for raw in rows:
        batch.step(raw)
    assert torch.allclose(RECORDS["full"][0], rows[2][0].log_softmax(-1))


def test_a_request_that_left_forces_nothing():
    batch = Batch(force("full", 3))
    batch.processor.update_state(BatchUpdate(0, [0], [], []))
    batch.step(torch.randn(1, 5))
    assert not RECORDS


def test_records_are_compared_once_and_must_be_whole():
    full, other = torch.randn(2, 5).log_softmax(-1), torch.randn(2, 5).log_softmax(-1)
    forget(None)
    assert compare(None, "full", "other", [0, 1]) is None, "a worker without logits"
    RECORDS["full"] = dict(enumerate(full))
    RECORDS["other"] = dict(enumerate(other))
    assert compare(None, "full", "other", [4, 2]) == divergence(full, other, [4, 2])
    assert list(RECORDS) == ["full"]
    assert compare(None, "full", "full", [4]).kl == [0]
    with pytest.raises(ValueError, match="the record 'other' has 0 of 2 steps; step 0 is missing"):
        compare(None, "full", "other", [4, 2])
    RECORDS["other"] = {1: other[1]}
    with pytest.raises(ValueError, match="the record 'other' has 1 of 2 steps; step 0 is missing"):
        compare(None, "full", "other", [4, 2])
    forget(None)


def test_the_engine_is_told_the_processors_name():
    module, _, name = fusion_measure.PROCESSOR.partition(":")
    assert (module, name) == (Forced.__module__, Forced.__qualname__)
