"""`ragkv bench gpu`: its first step on a simulated device, its judgement on made-up figures, and its report."""

import ctypes
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fake_cudart import Runtime
from ragkv import cli
from ragkv.benchmarks import gpu, gpu_copies, gpu_engines, gpu_workers
from ragkv.benchmarks import gpu_judge as judge
from ragkv.benchmarks.gpu_copies import Interleaved, Sizes, World, check_copies, check_layouts, check_pinning
from ragkv.benchmarks.gpu_judge import Check, Reply
from ragkv.checks import Finding
from ragkv.connectors.vllm.pinning import Pinning
from ragkv.connectors.vllm.streams import make_streams
from ragkv.kvstore.segment import FOLDER
from simulated_device import SimulatedStreams, TamperedStreams

CPU = torch.device("cpu")
TINY = Sizes(layers=2, heads=1, head_dim=4, block_tokens=2, page_tokens=4, tokens=16, rounds=5, staging=4 * 128)


def host(size):
    return torch.zeros(size, dtype=torch.uint8)


def nothing():
    return None


def rounds(broken=None, choose=None, streams=None):
    """Wrong elements of all rounds."""
    made = streams or TamperedStreams(SimulatedStreams(choose), broken or {})
    return World(TINY, CPU, made, host, nothing).run()


@pytest.mark.parametrize("seed", range(20))
def test_rounds_of_a_right_mover_are_right_in_any_order(seed):
    assert rounds(choose=random.Random(seed).randrange) == 0
    assert rounds(streams=make_streams(CPU)) == 0


@pytest.mark.parametrize(
    ("broken", "choose"),
    [
        ({"load": ["wait"]}, lambda ready: ready - 1),
        ({"store": ["wait"]}, lambda ready: ready - 1),
        ({"compute": ["wait"]}, lambda ready: 0),
        ({"compute": ["record"]}, lambda ready: ready - 1),
        ({"store": ["record"]}, lambda ready: 0),
    ],
)
def test_rounds_of_a_mover_that_leaves_out_a_wait_are_wrong(broken, choose):
    wrong = rounds(broken, choose)
    assert wrong > 0 and not judge.judge_copies(wrong, TINY.rounds).ok


def test_rounds_see_a_single_element(monkeypatch):
    world = World(TINY, CPU, make_streams(CPU), host, nothing)
    load = world.mover.load

    def harmed(rows, slots, shifts=None):
        ticket = load(rows, slots, shifts)
        world.cache.view(-1)[-1] ^= 1
        return ticket

    monkeypatch.setattr(world.mover, "load", harmed)
    assert world.run() == 1


def kernel(runtime):
    def launch():
        if error := runtime.cudaGetLastError():
            raise RuntimeError(f"CUDA error {error}")

    return launch


class Strict(Runtime):
    """As CUDA: nothing can be registered that is empty."""

    def cudaHostRegister(self, address, size, flags):
        return super().cudaHostRegister(address, size, flags) if size.value else self._note(1)


def test_pinning_is_tried_twice_and_refused_once():
    runtime = Strict()
    check, pinned = check_pinning(torch.zeros(64, dtype=torch.uint8), runtime, kernel(runtime))
    assert check.ok and "a second time too" in check.said and pinned.ok and len(runtime.pieces) == 1
    pinned.release()
    assert not runtime.pieces


def test_an_error_that_is_left_behind_ends_the_check(monkeypatch):
    runtime = Strict()

    def add(self, address, size):
        self.ok = runtime.cudaHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(size), 0) == 0

    monkeypatch.setattr(Pinning, "add", add)
    check, _ = check_pinning(torch.zeros(64, dtype=torch.uint8), runtime, kernel(runtime))
    assert not check.ok and check.decisive and "CUDA error 712" in check.said


@pytest.mark.parametrize("runtime", [Strict({0: 2}), Strict({1: 2}), Runtime()], ids=["first", "second", "empty"])
def test_pinning_that_does_not_go_as_it_must(runtime):
    check, _ = check_pinning(torch.zeros(64, dtype=torch.uint8), runtime, kernel(runtime))
    assert check.ok == (runtime.errors.get(1) == 2), "the second is registered already, whatever CUDA would say"


def test_layouts_are_proven_and_a_wrong_one_is_refused(monkeypatch):
    assert check_layouts(CPU, TINY).ok
    monkeypatch.setattr(Interleaved, "do_kv_cache_update", lambda self, layer, key, value, cache, slots: None)
    check = check_layouts(CPU, TINY)
    assert not check.ok and check.decisive and Interleaved.name in check.said


def test_the_first_step_whole_and_nothing_is_left():
    before = {path.name for path in FOLDER.glob("ragkv-bench-gpu-*")}
    runtime = Strict()
    speed = Sizes(layers=2, heads=1, head_dim=4, block_tokens=2, page_tokens=4, tokens=64, rounds=1, staging=2048)
    checks = list(check_copies(CPU, make_streams(CPU), 1 << 20, TINY, speed, runtime))
    assert [check.name for check in checks] == ["pinning", "layouts", "copies", "load speed", "store speed"]
    assert all(check.ok for check in checks[:3])
    assert all(check.figures["raw"] > 0 < check.figures["ours"] for check in checks[3:])
    assert not runtime.pieces
    assert {path.name for path in FOLDER.glob("ragkv-bench-gpu-*")} == before


# --- judgement ---

RIGHT, ROUNDED, WRONG = Reply((5,), {5: -0.1, 6: -3.0}), Reply((5,), {5: -0.105, 6: -3.1}), Reply((6,), {6: -0.1})
OFF = Reply((5,), {5: -0.15}, cached=10, ttft_s=0.4)


def test_the_distance_of_answers():
    assert judge.distance(RIGHT, RIGHT) == 0
    assert judge.distance(RIGHT, ROUNDED) == pytest.approx(0.005)
    assert judge.distance(RIGHT, WRONG) == math.inf


def reply(plain_s=0.0, cached=100, first=None):
    return Reply((5,), first or {5: -0.1}, cached, plain_s)


JUDGED = [
    (judge.judge_bandwidth("load", 50e9, 42.5e9), True),
    (judge.judge_bandwidth("load", 50e9, 42.4e9), False),
    (judge.judge_findings([Finding("vllm", "ok", "vLLM 0.32.0"), Finding("layout", "ok", "proven")]), True),
    (judge.judge_findings([Finding("vllm", "ok", "vLLM 0.32.0")]), False),
    (judge.judge_findings([Finding("layout", "ok", "proven"), Finding("vllm", "fail", "ended")]), False),
    (judge.judge_runner("V2", "FLASH_ATTN", True), True),
    (judge.judge_runner("V1", "FLASH_ATTN", True), False),
    (judge.judge_runner("V2", "FLASH_ATTN", False), False),
    (judge.judge_hit(1500, 32, 1499, 93, 93, True), True),
    (judge.judge_hit(1500, 32, 1498, 93, 93, True), False),
    (judge.judge_hit(1500, 32, 1499, 93, 92, True), False),
    (judge.judge_hit(1500, 32, 1499, 93, 93, False), False),
    (judge.judge_preemptions([RIGHT, RIGHT], [ROUNDED, RIGHT], 3, 0), True),
    (judge.judge_preemptions([RIGHT], [RIGHT], 0, 0), False),
    (judge.judge_preemptions([RIGHT], [RIGHT], 3, 1), False),
    (judge.judge_preemptions([RIGHT], [WRONG], 3, 0), False),
    (judge.judge_preemptions([RIGHT], [Reply((), RIGHT.first)], 3, 0), False),
    (judge.judge_fault("load", RIGHT, ROUNDED, 1), True),
    (judge.judge_fault("load", RIGHT, Reply((), {}, failed=True), 1), True),
    (judge.judge_fault("load", RIGHT, WRONG, 1), False),
    (judge.judge_fault("load", RIGHT, RIGHT, 0), False),
    (judge.judge_cold(2000, [1.0, 2.0, 3.0], [2.04, 1.0, 9.0]), True),
    (judge.judge_cold(2000, [1.0, 2.0, 3.0], [2.05, 1.0, 9.0]), False),
    (judge.judge_warm(2000, [0.10], [0.124], 0.015, [1999]), True),
    (judge.judge_warm(2000, [0.10], [0.126], 0.015, [1999]), False),
    (judge.judge_warm(2000, [0.10], [0.1], 0.015, [1999, 1998]), False),
    (judge.judge_delay("store", [0.02, 0.03, 0.5], [0.04, 0.03, 0.5]), True),
    (judge.judge_delay("store", [0.02, 0.03, 0.5], [0.041, 0.03, 0.5]), False),
    (judge.judge_full_fusion(RIGHT, reply(first={5: -0.109})), True),
    (judge.judge_full_fusion(RIGHT, reply(first={5: -0.111})), False),
    (judge.judge_full_fusion(RIGHT, reply(cached=0)), False),
    (judge.judge_fusion(reply(1.0), reply(0.49), 9), True),
    (judge.judge_fusion(reply(1.0), reply(0.49), 10), False),
    (judge.judge_fusion(reply(1.0), reply(0.5), 9), False),
    (judge.judge_fusion(reply(1.0), reply(0.49), -1), False),
    (judge.judge_fusion(reply(1.0), reply(0.49, cached=0), 9), False),
]


@pytest.mark.parametrize(("check", "ok"), JUDGED, ids=lambda each: each.name if isinstance(each, Check) else None)
def test_figures_are_judged(check, ok):
    assert check.ok is ok
    assert "\n" not in check.said and check.said
    json.dumps(check.figures)


# --- the run ---


def checks(*given):
    return lambda _: iter(given)


def test_a_decisive_failure_ends_the_run_and_another_does_not():
    shown = []
    slow, wrong = Check(1, "speed", False, "slow"), Check(1, "copies", False, "wrong", decisive=True)
    right, last = Check(1, "copies", True, "right", decisive=True), Check(2, "doctor", True, "well")
    assert gpu.check_all([checks(slow, right), checks(last)], shown.append) == [slow, right, last] == shown
    seen = []
    rest = [checks(slow), lambda found: seen.append(dict(found)) or [wrong, last], checks(last)]
    assert gpu.check_all(rest, lambda _: None) == [slow, wrong]
    assert seen == [{"speed": slow}], "a step knows what was found before"


@pytest.mark.parametrize("text", ["", "7", "1,,2", "1,1", "one", "0"])
def test_steps_that_cannot_be(text):
    with pytest.raises(ValueError, match="--steps"):
        gpu.parse_steps(text)
    assert gpu.parse_steps("3, 1") == [1, 3]


def test_without_a_gpu_it_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ragkv", "bench", "gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    assert ended.value.code == 1 and not out.out
    assert len(out.err.strip().splitlines()) == 1 and "needs a CUDA device" in out.err


@pytest.mark.parametrize("ok", [True, False])
def test_lines_report_and_status(ok, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    made = checks(Check(3, "hit", True, "1499 [of] 1500", True), Check(4, "failed load", ok, "plain's answer"))
    monkeypatch.setattr(gpu, "PARTS", {3: made, 4: made})
    file = tmp_path / "gpu.json"
    done = CliRunner().invoke(cli.app, ["bench", "gpu", "--steps", "3,4", "--json", str(file)])
    lines = done.output.splitlines()
    assert lines[0] == "ok   3 hit: 1499 [of] 1500"
    assert lines[1] == f"{'ok  ' if ok else 'fail'} 4 failed load: plain's answer"
    assert (done.exception is None) == ok and (ok or "1 of 2 checks failed: failed load" in str(done.exception))
    report = json.loads(file.read_text())
    assert report["device"] == "a card" and [each["ok"] for each in report["checks"]] == [True, ok]
    done = CliRunner().invoke(cli.app, ["bench", "gpu", "--steps", "3"])
    assert done.exception is None and "failed load" not in done.output


# --- beside engines ---


def test_no_prompt_begins_like_another():
    numbers = [*range(1, 7), 9, *range(40, 75), *range(100, 160), *range(1000, 1048), 2000, 2001, 10_000, 10_001]
    prompts = [gpu_engines.prompt(number, 400) for number in numbers]
    assert len({tuple(each[:8]) for each in prompts}) == len(numbers)
    assert all(10 <= min(each) <= max(each) < gpu_engines.VOCABULARY for each in prompts)
    assert all(len(set(each)) > 150 for each in prompts)


class Steps:
    """An engine of vLLM's that gives each answer a token a step, and each step takes as long as it is told."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.running, self.steps = clock, seconds, {}, 0

    def add_request(self, name, prompt, sampling):
        self.running[name] = self.steps, sampling.max_tokens

    def has_unfinished_requests(self):
        return bool(self.running)

    def step(self):
        self.clock.now += self.seconds(self.steps, "arrives" in self.running)
        self.steps += 1
        answers = {
            name: SimpleNamespace(token_ids=range(self.steps - at)) for name, (at, _) in self.running.items()
        }
        self.running = {name: (at, most) for name, (at, most) in self.running.items() if self.steps - at < most}
        return [SimpleNamespace(request_id=f"{name}-x", outputs=[answer]) for name, answer in answers.items()]


def test_the_longest_gap_is_that_between_steps_with_tokens(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(gpu_workers.time, "perf_counter", lambda: clock.now)
    usual = Steps(clock, lambda step, arriving: 9.0 if step < gpu_workers.WARM_TOKENS else 1.0 + 2.0 * arriving)
    assert gpu_workers.longest_gap(SimpleNamespace(llm_engine=usual), [[1], [2]], [3]) == 3.0
    assert not usual.running and usual.steps == gpu_workers.GAP_TOKENS
    alone = Steps(clock, lambda step, arriving: 5.0 if step == 150 else 1.0)
    assert gpu_workers.longest_gap(SimpleNamespace(llm_engine=alone), [[1], [2]], None) == 5.0


def worker_of(caches):
    layers = {f"layer.{n}": SimpleNamespace(kv_cache=cache) for n, cache in enumerate(caches)}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={**layers, "other": SimpleNamespace()}),
        cache_config=SimpleNamespace(block_size=16, num_gpu_blocks=5),
    )
    return SimpleNamespace(vllm_config=config)


def test_blocks_are_told_apart_bit_by_bit_wherever_they_lie():
    caches = [torch.randn(5, 2, 4, 8).bfloat16() for _ in range(2)]
    worker = worker_of(caches)
    assert gpu_workers.block_tokens(worker) == 16
    before = gpu_workers.block_hashes(worker)
    assert len(before) == 5
    for cache in caches:
        cache[[0, 3]] = cache[[3, 0]].clone()
    assert gpu_workers.block_hashes(worker) == before
    caches[1].view(torch.int16)[2, 1, 3, 7] ^= 1
    assert len(gpu_workers.block_hashes(worker) & before) == 4
    gpu_workers.wipe(worker)
    assert gpu_workers.block_hashes(worker) == set()


def test_what_is_broken_raises_once_and_is_counted(monkeypatch):
    class Fuser:
        def fuse(self, fusion):
            return fusion

    monkeypatch.setattr("ragkv.connectors.vllm.fusion_worker.Fuser", Fuser)
    gpu_workers.break_next(None, "fusion")
    with pytest.raises(OSError, match="injected"):
        Fuser().fuse(3)
    assert Fuser().fuse(4) == 4
    assert gpu_workers.broken(None) == 1 and gpu_workers.broken(None) == 0


def test_a_reply_is_what_came_or_that_it_failed():
    found = [{7: SimpleNamespace(logprob=-0.5), 9: SimpleNamespace(logprob=-1.5)}]
    metrics = SimpleNamespace(first_token_latency=0.25)
    answer = SimpleNamespace(token_ids=[7], logprobs=found, finish_reason="length")
    output = SimpleNamespace(outputs=[answer], num_cached_tokens=12, metrics=metrics)
    assert gpu_workers.reply(output) == Reply((7,), {7: -0.5, 9: -1.5}, 12, 0.25)
    answer.finish_reason = "error"
    assert gpu_workers.reply(output).failed


def test_dummy_weights_come_to_life():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    torch.nn.init.uniform_(model[0].weight, -1e-3, 1e-3)
    gpu_workers.enliven(SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model)))
    assert model[0].weight.std().item() == pytest.approx(64**-0.5, rel=0.01)
    assert bool((model[1].weight == 1).all())


def test_the_copies_step_has_sizes_that_fit_the_memory_it_takes():
    for sizes in (gpu_copies.ROUNDS, gpu_copies.SPEED):
        assert sizes.rounds * sizes.tokens * sizes.geometry.token_bytes <= 8 * gpu_copies.GIB
        assert sizes.tokens % sizes.page_tokens == 0 == sizes.tokens % sizes.block_tokens
