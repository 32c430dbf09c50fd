"""A minute of the fuzzer of engines, and whether it sees what it is for: wrong KV."""

from ragkv.benchmarks.internal.engine_fuzz import DISTINCT, FuzzOptions, fuzz


def spoil_a_token_of_some_loads():
    """Run in the engine's process: every fifth load leaves one token in vLLM's cache with another one's KV."""
    from ragkv.connectors.vllm.transfer import DirectMover

    load, calls = DirectMover.load, [0]

    def spoiled(mover, rows, slots, *more):
        ticket = load(mover, rows, slots, *more)
        calls[0] += 1
        if calls[0] % 5 == 0 and len(rows) > 1:
            load(mover, rows[:1], slots[-1:])
        return ticket

    DirectMover.load = spoiled


def test_an_engine_under_pressure_answers_as_plain_vllm_does():
    findings = fuzz(FuzzOptions(prompts=1000, seed=1))
    assert not findings.wrong and not findings.dead, (findings.wrong[:1], findings.dead)
    assert findings.prompts == 1000 and findings.outputs["equal"] > 900
    assert findings.outputs["near tie"] < 10 and findings.noise < 1e-4
    assert len(findings.answers) > DISTINCT * findings.distinct_prompts
    assert findings.aborted > 5 and findings.resets > 10
    for name, least in (
        ("hit_requests", 500),
        ("hit_tokens", 10_000),
        ("preemptions", 20),
        ("evicted_chunks", 1000),
    ):
        assert findings.engine[name] > least, findings.engine
    assert findings.faults.total() > 5


def test_the_fuzzer_sees_one_wrong_token():
    findings = fuzz(FuzzOptions(prompts=100, seed=1, store_faults=0, prepare=spoil_a_token_of_some_loads))
    assert findings.outputs["wrong"] > 0 and findings.outputs["equal"] > 0
    assert "log probabilities" in findings.wrong[0].what or "likeliest" in findings.wrong[0].what
