"""What the serving benchmark works out before anything starts."""

from pathlib import Path

import pytest

from ragkv.benchmarks.serve_setup import OURS, Model, cache_blocks, check_arguments, make_work, passed, size
from ragkv.benchmarks.serve_workload import Shape
from ragkv.errors import ConfigError

SMALL = Shape(filings=2, turns=2, tokens=200, answer_tokens=3, concurrency=1)


def cut(text, tokens):
    return text[:tokens]


def tokenizer_of(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model.path)


def lengths_of(model, sessions):
    """Tokens of every chat, as the model's template has it."""
    template = tokenizer_of(model).apply_chat_template
    chats = [list(turn.messages) for session in sessions for turn in session.turns]
    return [len(template(chat, add_generation_prompt=True)["input_ids"]) for chat in chats]


@pytest.mark.parametrize(("passages", "second"), [(1.0, "passages"), (0.0, "follow-up")])
def test_the_warm_up_has_a_text_of_its_own_and_does_what_is_timed_later(passages, second):
    shape = Shape(filings=2, turns=3, tokens=400, passages=passages, switch=0.5, think=2.0)
    work = make_work(shape, 3, None, cut)
    assert len({session.turns[0].messages[1]["content"] for session in work}) == 1 + 3 * 2
    (warm_up,) = work.warm_up
    assert [turn.kind for turn in warm_up.turns] == ["open", second] and warm_up.think == (0.0,)
    assert len(list(work)) == 7


def test_vllms_own_cache_holds_the_requests_in_flight_and_no_more():
    shape = Shape(concurrency=2)
    assert cache_blocks(3300, 128, shape, None) == 2 * 27 + 1
    assert cache_blocks(3328, 128, shape, None) == 2 * 27 + 1
    assert cache_blocks(3329, 128, shape, None) == 2 * 28 + 1
    assert cache_blocks(3300, 128, Shape(concurrency=9, sessions=3), None) == 3 * 27 + 1
    assert cache_blocks(3300, 128, shape, 27 * 128) == 28
    assert cache_blocks(3300, 128, shape, 27 * 128 + 1) == 29
    with pytest.raises(ConfigError, match=r"kv_cache_tokens = 3455; allowed: at least 3456"):
        cache_blocks(3300, 128, shape, 3455)


def test_options_for_vllm_are_found_among_its_arguments():
    assert passed(["--block-size", "16", "--block-size=32"], "--block-size") == "32"
    assert passed(["--block-size=32", "--block-size", "16"], "--block-size") == "16"
    assert passed(["--block-sizes", "16", "--block-size"], "--block-size") is None


def test_sizes_say_what_they_are_of():
    assert size("memory", "2GiB") == 2**31
    with pytest.raises(ConfigError, match="memory = lots; allowed: a whole number of bytes"):
        size("memory", "lots")


def test_a_model_cuts_and_counts():
    model = Model(None, print)
    work = make_work(SMALL, 1, None, model.cut)
    assert model.name == "SmolLM2-135M-Instruct" and Path(model.path).is_dir()
    lengths = lengths_of(model, work)
    text = work.rounds[0][0].turns[0].messages[1]["content"]
    assert 200 < len(tokenizer_of(model).encode(text)) < 240
    assert model.longest(work, 32) == max(lengths) + 32 + 16
    assert model.longest(work, 8192 - max(lengths)) == 8192, "no more than the model takes"
    told = rf"{max(lengths)} tokens and {8193 - max(lengths)} of an answer; .* 8192"
    with pytest.raises(ConfigError, match=told):
        model.longest(work, 8193 - max(lengths))


def test_the_longest_chat_may_be_the_one_before_a_switch():
    model = Model(None, print)
    shape = Shape(filings=2, sessions=1, turns=6, tokens=200, switch=1.0, passages=0.3, seed=4)
    work = make_work(shape, 1, None, model.cut)
    lengths = lengths_of(model, work.rounds[0])
    assert lengths.index(max(lengths)) == 2 and lengths[2] > lengths[1] + 16
    assert model.longest(work, 8) == lengths[2] + 8 + 16


@pytest.mark.parametrize("option", OURS)
def test_arguments_that_would_undo_the_comparison_are_refused(option):
    check_arguments(["--enforce-eager", "--model-impl", "vllm", "-tp", "2", option.removeprefix("--")])
    for argument in (option, f"{option}=1", f"{option}.kv_connector=x", "--" + option[2:].replace("-", "_")):
        with pytest.raises(ConfigError, match=f"^{option} among vLLM's arguments; allowed: all but it"):
            check_arguments(["--enforce-eager", argument, "1"])


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=rf"model = {tmp_path}: ") as caught:
        Model(str(tmp_path), print)
    assert "\n" not in str(caught.value)
