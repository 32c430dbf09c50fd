"""Every kind of model: equal to plain vLLM, tokens and log probabilities, with all hit that can be hit; or one
line that says why not."""

import functools
import platform
import random
import zlib
from pathlib import Path

import pytest

from models.kinds import KINDS, VOCABULARY, make
from ragkv.benchmarks.engine import EngineOptions
from rig.beside import Ask
from rig.engines import Plain, RigEngine

CPU = Path("/proc/cpuinfo")
LONG, BLOCKS, MOST_CHUNK = 600, 80, 256
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
SHAPE = {"skip_tokenizer_init": True, "generation_config": "vllm", "enforce_eager": True, "max_num_seqs": 8}


def options(folder, ragkv, dtype="float32", **llm):
    given = SHAPE | {"num_gpu_blocks_override": BLOCKS} | llm
    return EngineOptions(
        folder, ragkv, dtype, max_model_len=1024, llm=given, environment=ENVIRONMENT, one_process=True
    )


@pytest.fixture(scope="module")
def engine(kind, folder):
    """What makes an engine with ragkv, on a folder that outlives it."""
    return functools.partial(start, folder, dtype=kind.dtype, **kind.speculation(folder))


def settings(disk):
    return {"memory": {"capacity": "64MiB"}, "disk": {"path": str(disk)}, "placement": {"gate": False}}


def start(folder, disk, **llm):
    return RigEngine(options(folder, settings(disk), **llm))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.slug)
def kind(request):
    needs = request.param.needs
    if needs and platform.machine() == "x86_64" and needs not in CPU.read_text().split():
        pytest.skip(f"vLLM has no kernel for it on a CPU without {needs}")
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return make(kind, tmp_path_factory.mktemp(kind.slug) / "model")


@pytest.fixture(scope="module")
def plain(kind, folder):
    """Plain vLLM; of models with states with vLLM's own choice, since those that cache prefixes are computed
    otherwise than those that do not."""
    cached = {} if kind.states or not kind.served else {"enable_prefix_caching": False}
    with RigEngine(options(folder, None, kind.dtype, **cached)) as made:
        yield Plain(made.wait())


@pytest.fixture(scope="module")
def fresh(kind):
    chance = random.Random(zlib.crc32(kind.slug.encode()))
    return lambda length: tuple(chance.randrange(3, VOCABULARY) for _ in range(length))


@pytest.fixture
def ask(kind, plain):
    """The tokens that were not computed, of an answer that is plain vLLM's."""

    def asked(made, prompt):
        (found,) = made.answers([Ask(prompt, kind.tokens)])
        plain.check([Ask(prompt, kind.tokens)], [found], kind.near)
        return found.cached

    return asked


def test_a_model_that_is_served_answers_as_plain_vllm_does_and_hits_all_it_can(
    kind, engine, plain, ask, fresh, tmp_path
):
    if not kind.served:
        pytest.skip(f"not served: {kind.says}")
    first, document = fresh(LONG), fresh(LONG)
    said = (*first, *plain.answer(first, tokens=kind.tokens).tokens)
    turn, short = (*said, *fresh(50)), (*said, *fresh(1))
    other, early = (*first[: LONG - 70], *fresh(90)), (*first[: LONG // 2], *fresh(40))
    again = (*first[: LONG // 2], *fresh(45))
    assert (
        len({plain.answer(each, tokens=kind.tokens).tokens for each in (first, turn, other, early, document)}) == 5
    )
    with engine(tmp_path) as made:
        assert ask(made, first) == 0
        made.evict()
        assert ask(made, first) == kind.reach(LONG - 1)
        made.evict()
        assert ask(made, short) == len(said) - 1
        assert ask(made, turn) >= LONG
        made.evict()
        assert ask(made, turn) == kind.reach(len(turn) - 1)
        made.evict()
        part = ask(made, other)
        assert part == kind.reach(LONG - 70) or (kind.states and part < LONG - 70)
        made.evict()
        part = ask(made, early)
        assert part == LONG // 2 or (kind.windows and part < LONG // 2)
        made.evict()  # where prompts have parted once, windows and states are kept
        assert LONG // 2 - MOST_CHUNK < ask(made, again) <= LONG // 2
        made.evict()
        asks = [Ask(each, kind.tokens) for each in (document, first, other, turn, document)]
        plain.check(asks, made.answers(asks), kind.near)
        if kind.windows:
            (told,) = made.answers([Ask(first, kind.tokens, hints={"fuse": True})])
            plain.check([Ask(first, kind.tokens)], [told], kind.near)
            assert [each["decision"] for each in told.told["documents"]] == ["unsupported"]
            assert "windows" in told.told["documents"][0]["reason"]
        made.rest()
    with engine(tmp_path) as restarted:  # all it knows is on disk
        part = ask(restarted, document)  # the answer may have moved a cut into the prompt before it was written
        assert part == kind.reach(LONG - 1) or (not kind.windows and LONG - MOST_CHUNK <= part < LONG - 1)
        part = ask(restarted, other)  # of tails behind one chunk one is kept there
        exact = part == kind.reach(len(other) - 1) or (not kind.windows and part >= len(other) - MOST_CHUNK)
        assert exact or (kind.states and part < len(other) - 1)


def test_as_much_of_what_is_drafted_behind_a_hit_is_accepted(kind, engine, fresh, tmp_path):
    """The draft model is the model itself, so all is accepted if its KV is right."""
    if kind.method != "draft_model":
        pytest.skip("nothing is known of what is drafted")
    prompt, accepted = fresh(LONG), []
    with engine(tmp_path) as made:
        for _ in range(2):
            before = made.count("vllm:spec_decode_num_accepted_tokens_total")
            (found,) = made.answers([Ask(prompt, 21)])
            accepted.append(made.count("vllm:spec_decode_num_accepted_tokens_total") - before)
            made.evict()
    assert found.cached == LONG - 1 and accepted[0] == accepted[1] >= 15


def test_small_caches_preemption_and_chunked_prefill(kind, engine, plain, fresh, tmp_path):
    if not kind.served:
        pytest.skip(f"not served: {kind.says}")
    base = fresh(400)
    prompts = [(*base[:cut], *fresh(200)) for cut in (60, 130, 200, 256, 300, 400)]
    asks = [Ask(each, 20 if kind.tokens > 1 else 1) for each in (*prompts, *prompts[::-1])]
    blocks = 40 if kind.windows else 14  # of all groups together
    with engine(tmp_path, num_gpu_blocks_override=blocks, max_num_batched_tokens=192) as made:
        plain.check(asks, made.answers(asks), kind.near)
        made.evict()
        found = made.answers(asks)
        plain.check(asks, found, kind.near)
        assert sum(each.cached for each in found) > (0 if kind.windows else sum(map(len, prompts)))


def test_a_model_that_is_not_served_runs_as_plain_vllm_and_says_why_once(kind, engine, ask, fresh, tmp_path):
    if kind.served:
        pytest.skip("served")
    prompt = fresh(LONG)
    with engine(tmp_path) as made:
        assert ask(made, prompt) == 0
        made.evict()
        assert ask(made, prompt) == 0
        said = [line for line in made.log.read_text().splitlines() if "runs without KV reuse" in line]
    assert said and all(kind.says in line for line in said)
