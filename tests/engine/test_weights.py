"""KV belongs to what computes it: weights under other names and seeds, edited files, changes in a running engine.

Three engines, one after the other, over one folder.
"""

import shutil

import pytest
import torch

from engine_tools import in_workers, room, scale_weights
from ragkv.benchmarks.engine import Engine, EngineOptions
from ragkv.benchmarks.internal.fusion_measure import ENVIRONMENT

TOKENS, ANSWER = 400, 8
BOUND = 256  # steps within which a change must be noticed
LATER = 20  # steps
EDITED = "model.layers.3.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def prompts(filings):
    return [filing[500 : 500 + TOKENS] for filing in filings[:4]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights") / "disk"


@pytest.fixture(scope="module")
def copied(model, tmp_path_factory):
    """A model folder of its own, with other names and the same weights."""
    to = tmp_path_factory.mktemp("model") / "another-name"
    shutil.copytree(model, to)
    return to


def options(model, folder, **llm):
    settings = {
        "memory": {"capacity": room(model, 5600)},
        "disk": {"path": str(folder)},
        "placement": {"gate": False},
    }
    return EngineOptions(model, settings, "float32", 2048, llm, ENVIRONMENT, one_process=True)


def ask(engine, prompt, **sampling):
    engine.evict()
    return engine.ask([prompt], ANSWER, **sampling)[0]


def hits(answer):
    return sum(answer.hit_tokens.values())


def judged(engine, prompt, salt):
    """An answer; and whether it is that of full prefill."""
    answer = ask(engine, prompt)
    return answer, answer.tokens == ask(engine, prompt, cache_salt=salt).tokens


@pytest.fixture(scope="module")
def running(model, folder, prompts):
    """What an engine says while its weights change and come back; it has ended."""
    first, second, third, fourth = prompts
    with Engine(options(model, folder)) as engine:
        seen = {"cold": ask(engine, first), "warm": ask(engine, first)}
        engine.call(in_workers, scale_weights, 2.0, LATER)
        engine.ask([second], LATER + 30, ignore_eos=True)  # begins with the old weights, and ends with the new
        engine.ask([third], BOUND, ignore_eos=True)
        seen["own"] = engine.ask([third], ANSWER)[0], engine.ask([third], ANSWER, cache_salt="a")[0]
        for number, prompt in enumerate((first, second)):
            seen["changed", number] = judged(engine, prompt, f"b{number}")
        engine.call(in_workers, scale_weights, 0.5, 0)
        for number, prompt in enumerate((first, second, fourth)):
            seen["back", number] = judged(engine, prompt, f"c{number}")
        return seen


def test_a_change_behind_vllms_back_is_noticed_and_nothing_of_before_is_served(running):
    assert hits(running["cold"]) == 0 and hits(running["warm"]) > TOKENS - 32
    for number in (0, 1):
        answer, right = running["changed", number]
        assert hits(answer) == 0 and right
    assert running["changed", 0][0].tokens != running["cold"].tokens, "the change is one"
    mine, salted = running["own"]
    assert mine.tokens == salted.tokens, "vLLM's own cache gives nothing of before either"


def test_known_weights_that_come_back_find_their_kv(running):
    answer, right = running["back", 0]
    assert hits(answer) > TOKENS - 32 and right and answer.tokens == running["cold"].tokens
    for number in (1, 2):
        answer, right = running["back", number]
        assert right, "what was computed while they changed is not theirs"


def test_other_names_seeds_and_load_formats_share(running, copied, folder, prompts):
    with Engine(options(copied, folder, seed=7, load_format="safetensors")) as engine:
        answer = ask(engine, prompts[0])
        assert hits(answer) > TOKENS - 32 and answer.tokens == running["cold"].tokens
        assert judged(engine, prompts[1], "d")[1]


def test_one_bit_of_a_file_makes_another_model(running, copied, folder, prompts):
    """Last: it changes the folder."""
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    weights = load_file(file)
    weights[EDITED].view(torch.int16)[77, 130] ^= 1
    save_file(weights, file, metadata={"format": "pt"})
    with Engine(options(copied, folder)) as engine:
        assert hits(ask(engine, prompts[0])) == 0
