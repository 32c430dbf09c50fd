"""Every kind of model: equal to plain vLLM, tokens and log probabilities, with all hit that can be hit; or one
line that says why not."""

import random
import zlib

import pytest

from models.kinds import KINDS, VOCABULARY, make
from ragkv.benchmarks.engine import EngineOptions
from rig.beside import Ask
from rig.engines import Plain, RigEngine, differences

LONG, BLOCKS, TOKENS, MOST_CHUNK = 600, 80, 6, 256
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
SHAPE = {"skip_tokenizer_init": True, "generation_config": "vllm", "enforce_eager": True, "max_num_seqs": 8}


def options(folder, settings, **llm):
    given = SHAPE | {"num_gpu_blocks_override": BLOCKS} | llm
    return EngineOptions(
        folder, settings, "float32", max_model_len=1024, llm=given, environment=ENVIRONMENT, one_process=True
    )


def engine(folder, disk, **llm):
    """An engine with ragkv, on a folder that outlives it."""
    settings = {"memory": {"capacity": "64MiB"}, "disk": {"path": str(disk)}, "placement": {"gate": False}}
    return RigEngine(options(folder, settings, **llm))


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.slug)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return make(kind, tmp_path_factory.mktemp(kind.slug) / "model")


@pytest.fixture(scope="module")
def plain(kind, folder):
    """Plain vLLM; where ragkv stands aside with vLLM's own choice, since models of states that cache prefixes are
    computed otherwise than those that do not."""
    with RigEngine(options(folder, None, **({"enable_prefix_caching": False} if kind.served else {}))) as made:
        yield Plain(made.wait())


@pytest.fixture(scope="module")
def fresh(kind):
    chance = random.Random(zlib.crc32(kind.slug.encode()))
    return lambda length: tuple(chance.randrange(3, VOCABULARY) for _ in range(length))


def ask(made, plain, prompt):
    """The tokens that were not computed, of an answer that is plain vLLM's."""
    (found,) = made.answers([Ask(prompt, TOKENS)])
    assert [*differences(plain.answers([Ask(prompt, TOKENS)]), [found])] == []
    return found.cached


def test_a_model_that_is_served_answers_as_plain_vllm_does_and_hits_all_it_can(
    kind, folder, plain, fresh, tmp_path
):
    if not kind.served:
        pytest.skip(f"not served: {kind.says}")
    first, document = fresh(LONG), fresh(LONG)
    turn = (*first, *plain.answer(first, tokens=TOKENS).tokens, *fresh(50))
    other, early = (*first[: LONG - 70], *fresh(90)), (*first[: LONG // 2], *fresh(40))
    again = (*first[: LONG // 2], *fresh(45))
    assert len({plain.answer(each, tokens=TOKENS).tokens for each in (first, turn, other, early, document)}) == 5
    with engine(folder, tmp_path) as made:
        assert ask(made, plain, first) == 0
        made.evict()
        assert ask(made, plain, first) == LONG - 1
        assert ask(made, plain, turn) >= LONG
        for prompt, shared in ((turn, len(turn) - 1), (other, LONG - 70)):
            made.evict()
            assert ask(made, plain, prompt) == shared
        made.evict()
        part = ask(made, plain, early)
        assert part == LONG // 2 or (kind.windows and part < LONG // 2)
        made.evict()  # where prompts have parted once, windows are kept
        assert LONG // 2 - MOST_CHUNK < ask(made, plain, again) <= LONG // 2
        made.evict()
        asks = [Ask(each, TOKENS) for each in (document, first, other, turn, document)]
        plain.check(asks, made.answers(asks))
        if kind.windows:
            (told,) = made.answers([Ask(first, TOKENS, hints={"fuse": True})])
            plain.check([Ask(first, TOKENS)], [told])
            assert [each["decision"] for each in told.told["documents"]] == ["unsupported"]
            assert "windows" in told.told["documents"][0]["reason"]
    with engine(folder, tmp_path) as restarted:  # all it knows is on disk
        assert ask(restarted, plain, document) == LONG - 1
        assert ask(restarted, plain, other) == len(other) - 1  # of tails behind one chunk the last is kept there


def test_small_caches_preemption_and_chunked_prefill(kind, folder, plain, fresh, tmp_path):
    if not kind.served:
        pytest.skip(f"not served: {kind.says}")
    base = fresh(400)
    prompts = [(*base[:cut], *fresh(200)) for cut in (60, 130, 200, 256, 300, 400)]
    asks = [Ask(each, 20) for each in (*prompts, *prompts[::-1])]
    blocks = 40 if kind.windows else 14  # of all groups together
    with engine(folder, tmp_path, num_gpu_blocks_override=blocks, max_num_batched_tokens=192) as made:
        plain.check(asks, made.answers(asks))
        made.evict()
        found = made.answers(asks)
        plain.check(asks, found)
        assert sum(each.cached for each in found) > (0 if kind.windows else sum(map(len, prompts)))


def test_a_model_that_is_not_served_runs_as_plain_vllm_and_says_why_once(kind, folder, plain, fresh, tmp_path):
    if kind.served:
        pytest.skip("served")
    prompt = fresh(LONG)
    with engine(folder, tmp_path) as made:
        assert ask(made, plain, prompt) == 0
        made.evict()
        assert ask(made, plain, prompt) == 0
        said = [line for line in made.log.read_text().splitlines() if "runs without KV reuse" in line]
    assert said and all(kind.says in line for line in said)
