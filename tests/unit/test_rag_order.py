"""Passages in stored order, as applications ask for them."""

import itertools

import pytest

from rag_tools import PASSAGES, SYSTEM, runs
from ragkv import rag
from ragkv.connectors.vllm.hints import read_hints
from ragkv.errors import RagKVError


def asked_order(fake):
    return [body for body in fake.prompts() if "order" in body["kv_transfer_params"]["ragkv"]]


def test_passages_in_the_order_that_the_engine_has(fake, server):
    server.complete(rag.prompt(server, SYSTEM, [PASSAGES[2], PASSAGES[0]], "Why?"), max_tokens=1)
    found = rag.order(server, SYSTEM, PASSAGES, cache_salt="desk")
    assert found.passages == [PASSAGES[2], PASSAGES[0], PASSAGES[1]] and found.ranks == [2, 0, 1]
    sizes = [len(each) for each in runs(rag.prompt(server, SYSTEM, PASSAGES)).values()]
    assert (found.tokens, found.ordered_tokens, found.given_tokens) == (sum(sizes), sizes[2] + sizes[0], 0)
    assert found.relevance == "Passages by relevance, the most relevant first: 2, 3, 1."
    (body,) = asked_order(fake)
    assert len(body["prompt"]) == 1 == body["max_tokens"] and body["cache_salt"] == "desk"
    hints = read_hints(body["kv_transfer_params"])
    assert not hints.problems and not hints.store and hints.fuse is False
    there = rag.prompt(server, SYSTEM, PASSAGES)
    assert [*hints.order.before] == there.token_ids[: there.documents[0]["start"]]
    assert [each.tolist() for each in hints.order.passages] == list(runs(there).values())


@pytest.mark.parametrize(
    "told",
    [
        None,
        {},
        {"ragkv": None},
        {"ragkv": {"order": [2, 0, 1]}},
        {"ragkv": {"order": {"passages": [0, 0, 1]}}},
        {"ragkv": {"order": {"passages": [0, 1]}}},
        {"ragkv": {"order": {"passages": "210"}}},
        {"ragkv": {"order": {"passages": [0, "1", 2]}}},
        {"ragkv": {"order": {"passages": [0, None, 2]}}},
        {"ragkv": {"order": {"passages": [[0], 1, 2]}}},
        {"ragkv": {"order": {"passages": [2.0, 0.0, 1.0]}}},
        {"ragkv": {"order": {"passages": [2, 0, True]}}},
    ],
)
def test_a_server_that_knows_no_order_leaves_the_one_given(fake, server, told):
    fake.answers["/v1/completions"] = lambda body: (200, {"kv_transfer_params": told})
    found = rag.order(server, SYSTEM, PASSAGES)
    assert found.passages == PASSAGES and found.ranks == [0, 1, 2] and found.ordered_tokens == 0


def test_one_passage_or_none_needs_no_request(fake, server):
    assert rag.order(server, SYSTEM, []).passages == []
    assert rag.order(server, SYSTEM, [PASSAGES[0], PASSAGES[0]]).passages == [PASSAGES[0]], "each once"
    assert not fake.prompts()


def test_errors_of_an_order_are_those_of_a_prompt(fake, server):
    with pytest.raises(ValueError, match="passages"):
        rag.order(server, SYSTEM, "text")
    fake.answers["/v1/completions"] = lambda body: (500, {"detail": "no"})
    with pytest.raises(RagKVError):
        rag.order(server, SYSTEM, PASSAGES)


def messages_of(order, question="Why?"):
    text = "\n\n".join(["Read this.", *(PASSAGES[number][1] for number in order), question])
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]


def test_passages_of_messages_change_places(fake, server):
    stored = rag.chat(server, messages_of([2, 0], "Other?"), [PASSAGES[2], PASSAGES[0]])
    server.complete(stored, max_tokens=1)
    new, found = rag.order_chat(server, messages_of([0, 1, 2]), PASSAGES)
    assert new == messages_of([2, 0, 1]) and found.ranks == [2, 0, 1]
    assert found.passages == [PASSAGES[2], PASSAGES[0], PASSAGES[1]] and found.ordered_tokens > 0
    first, second, *_ = (each["id"] for each in rag.chat(server, new, PASSAGES).documents)
    assert (first, second) == ("snow", "wind")


def test_passages_of_earlier_messages_stay(fake, server):
    history = [*messages_of([1, 0]), {"role": "assistant", "content": "So."}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "And?"}]}, {"role": "user", "content": "Well?"}]
    same, found = rag.order_chat(server, [*history, *parts], PASSAGES)
    assert same == [*history, *parts] and found.passages == [PASSAGES[1], PASSAGES[0]]
    for order in ([1, 2], [1, 0]):  # one of them, or both, stand in the history too
        again = [*history, messages_of(order)[1]]
        new, found = rag.order_chat(server, again, PASSAGES)
        assert new == again and found.ordered_tokens == 0
    new, found = rag.order_chat(server, messages_of([]), PASSAGES)
    assert new == messages_of([]) and found.passages == []


def test_passages_that_contain_others_are_not_torn_apart(fake, server):
    long, short, other = "Rain fell all day in the valley", "Rain fell", "Snow stayed on the hills until June"
    told = {"ragkv": {"order": {"passages": [2, 0, 1]}}}
    content = "\n\n".join([f"Read of {short}.", long, other, short, "Why?"])
    fake.answers["/v1/completions"] = lambda body: (200, {"kv_transfer_params": told})
    for given in itertools.permutations([long, other, short]):
        new, _ = rag.order_chat(server, [{"role": "user", "content": content}], given)
        parts = new[0]["content"].split("\n\n")
        assert parts[0] == f"Read of {short}." and parts[-1] == "Why?"
        assert sorted(parts[1:-1]) == sorted([long, other, short])


def test_passages_with_other_text_between_some_of_them_stay(fake, server):
    content = "\n\n".join([PASSAGES[0][1], "And then:", PASSAGES[1][1], PASSAGES[2][1], "Why?"])
    message = {"role": "user", "content": content}
    assert rag.order_chat(server, [message], PASSAGES)[0] == [message] and not fake.prompts()


def test_a_conversation_goes_on_behind_what_it_sent(fake, server):
    server.complete(rag.prompt(server, SYSTEM, [PASSAGES[2], PASSAGES[0]], "Else?"), max_tokens=1)
    talk = rag.Conversation(server, SYSTEM)
    first = talk.ask(PASSAGES[:3:2], "Why?", relevance=True)
    assert [each["id"] for each in first.documents] == ["snow", "wind"]
    text = fake.tokenizer.decode(first.token_ids)
    assert text.endswith("Passages by relevance, the most relevant first: 2, 1.\n\nWhy?")
    talk.answered(" Because.")
    second = talk.ask(PASSAGES, "And?", fuse=None)
    assert talk.left_out == {"snow", "wind"} and [each["id"] for each in second.documents] == [
        "snow",
        "wind",
        "rain",
    ]
    assert second.token_ids[: len(first.token_ids)] == first.token_ids
    assert fake.tokenizer.decode(second.token_ids) == text + " Because.\n\n" + PASSAGES[1][1] + "\n\nAnd?"
    assert runs(second)["rain"] == runs(rag.prompt(server, "", [PASSAGES[1]]))["rain"]
    assert "fuse" not in second.hints and len(asked_order(fake)) == 1, "behind an answer nothing is stored yet"


def test_a_turn_that_was_not_answered_is_forgotten(server):
    talk = rag.Conversation(server, SYSTEM)
    first = talk.ask(PASSAGES[:1], "Why?")
    assert talk.ask(PASSAGES[:1], "Why?") == first and talk.left_out == frozenset()
    talk.answered([5, 6], closing="")
    assert talk.ask([], "And?").token_ids[: len(first.token_ids) + 2] == [*first.token_ids, 5, 6]


def test_a_conversation_asks_for_an_order_in_its_first_turn_alone(fake, server):
    talk = rag.Conversation(server, SYSTEM)
    talk.ask([], "Hello?")
    talk.answered(" Hi.")
    assert [each["id"] for each in talk.ask(PASSAGES, "Why?").documents] == ["wind", "rain", "snow"]
    assert not asked_order(fake)


def test_an_answer_belongs_to_a_prompt_and_an_id_to_a_text(server):
    talk = rag.Conversation(server, SYSTEM)
    with pytest.raises(ValueError, match="nothing was asked"):
        talk.answered("Early.")
    talk.ask(PASSAGES[:1], "Why?")
    talk.answered("So.")
    with pytest.raises(ValueError, match="nothing was asked"):
        talk.answered("Again.")
    with pytest.raises(ValueError, match="id 'wind' again; allowed: one text an id"):
        talk.ask([("wind", "Another text.")], "And?")
