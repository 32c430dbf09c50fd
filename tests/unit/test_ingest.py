"""`ragkv ingest`: cutting files, prefilling behind the system prompt, going on after faults."""

import itertools
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from typer.testing import CliRunner

from fake_vllm import BOS, ToyTokenizer, serving
from ragkv import rag
from ragkv.cli import app
from ragkv.cli.ingest import default_journal
from ragkv.errors import RagKVError
from ragkv.ingest import ASKED, Ingest, Journal, Passage, cut, served

SYSTEM = "Answer from the passages."
PARAGRAPH = "A sentence of seven words stands here. "


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "kept" / "journal.jsonl"


@pytest.fixture
def run(fake, journal, tmp_path, monkeypatch):
    """Run `ragkv ingest`; exit status, what was shown, and the figures."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, url=fake.url):
        figures = tmp_path / "figures.json"
        figures.unlink(missing_ok=True)
        given = ["ingest", *arguments, "--url", url, "--journal", journal, "--json", figures]
        result = CliRunner().invoke(app, list(map(str, given)))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output, json.loads(figures.read_text()) if figures.exists() else None

    return run


@pytest.fixture
def files(tmp_path):
    """Two files, of two and of three passages of at most 40 tokens."""
    made = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for number, file in enumerate(made):
        parts = (f"{number}.{part} {PARAGRAPH * 3}" for part in range(2 + number))
        file.write_text("\n\n".join(parts), encoding="utf-8")
    return made


def ids(bodies):
    return sorted(each["id"] for body in bodies for each in body["kv_transfer_params"]["ragkv"]["documents"])


def test_every_passage_is_prefilled_alone_behind_the_system_prompt(fake, run, files):
    status, shown, figures = run(*files, "--system-prompt", SYSTEM, "--passage-tokens", 40)
    assert status == 0
    assert ids(fake.prompts()) == ["one.txt#0", "one.txt#1", "two.txt#0", "two.txt#1", "two.txt#2"]
    behind = [BOS, *fake.tokenizer.encode(SYSTEM + "\n\n")]
    for body in fake.prompts():
        hints = body["kv_transfer_params"]["ragkv"]
        (document,) = hints["documents"]
        assert hints["fuse"] is False and hints["turn"] == 0 and body["max_tokens"] == 1 and body["model"] == "toy"
        assert body["prompt"][: document["start"]] == behind and document["end"] == len(body["prompt"])
        number = document["id"][len("one.txt#") :]
        text = fake.tokenizer.decode(body["prompt"][document["start"] :])
        assert text == f"{'01'[document['id'][:3] == 'two']}.{number} {PARAGRAPH * 3}".rstrip() + "\n\n"
    assert figures["model"] == "toy" and figures["system_tokens"] == len(behind) and figures["reported"]
    assert [each["passages"] for each in figures["files"]] == [2, 3]
    tokens = sum(len(body["prompt"]) - len(behind) for body in fake.prompts())
    assert sum(each["tokens"] for each in figures["files"]) == tokens
    sent = sum(len(body["prompt"]) for body in fake.prompts())
    assert sum(each["stored_tokens"] for each in figures["files"]) == sent
    assert "one.txt" in shown and "all" in shown and "toy, behind a system prompt of" in shown


def test_what_is_stored_is_passed_over_until_asked_for_again(fake, run, files):
    run(*files, "--passage-tokens", 40)
    sent = len(fake.prompts())
    status, _, figures = run(*files, "--passage-tokens", 40)
    assert status == 0 and len(fake.prompts()) == sent
    assert [each["known"] for each in figures["files"]] == [2, 3]
    run(*files, "--passage-tokens", 40, "--again")
    assert len(fake.prompts()) == 2 * sent


def test_another_system_prompt_model_text_or_server_is_new(fake, run, files):
    run(files[0], "--whole")
    for more in (["--system-prompt", SYSTEM], ["--model", "toy-lora"]):
        sent = len(fake.prompts())
        run(files[0], "--whole", *more)
        assert len(fake.prompts()) == sent + 1
    assert fake.prompts()[-1]["model"] == "toy-lora"
    files[0].write_text("Something else.")
    assert run(files[0], "--whole")[2]["files"][0]["known"] == 0
    files[0].write_text("\ufeff\nSomething else.\n\n", encoding="utf-8")
    assert run(files[0], "--whole")[2]["files"][0]["known"] == 1
    with serving() as other:
        assert run(files[0], "--whole", url=other.url)[2]["files"][0]["known"] == 0


def test_the_system_prompt_may_be_a_file(fake, run, files, tmp_path):
    file = tmp_path / "system"
    file.write_text(f"\ufeff{SYSTEM}\n", encoding="utf-8")
    run(files[0], "--system-prompt", file)
    assert fake.tokenizer.decode(fake.prompts()[0]["prompt"]).startswith(f"{SYSTEM}\n\n0.0 ")
    run(files[0], "--system-prompt", "x" * 300 + "/" + "y" * 5000)  # longer than a path may be
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"--system-prompt = .*system: byte 0 is not UTF-8"):
        run(files[0], "--system-prompt", file)


def test_a_file_that_fails_is_reported_and_the_others_go_on(fake, run, files, tmp_path):
    (tmp_path / "binary").write_bytes(b"good \xff\xfe")
    (tmp_path / "blank").write_text(" \n\n ")
    missing = tmp_path / "[red]missing"
    fake.answers["/v1/completions"] = lambda body: (
        (500, {"error": {"message": "no [bold]"}}) if ids([body]) == ["two.txt#1"] else None
    )
    given = (files[1], missing, tmp_path, tmp_path / "binary", tmp_path / "blank", files[0])
    status, shown, figures = run(*given, "--passage-tokens", 40, "--concurrency", 1)
    assert status == 1
    errors = [each["error"] for each in figures["files"]]
    assert errors[0].endswith("500: no [bold]") and errors[0].startswith("two.txt#1: ")
    missed = ["No such file or directory", "Is a directory"]
    assert errors[1:] == [*missed, "it is not UTF-8: byte 5", "it holds no text", None]
    assert f"{missing}: No such file or directory\n" in shown
    assert f"{files[1]}: {errors[0]}\n" in shown and f"{files[0]}: " not in shown
    assert ids(fake.prompts()) == ["one.txt#0", "one.txt#1", "two.txt#0", "two.txt#1"]  # and not two.txt#2
    fake.answers.clear()
    before = len(fake.prompts())
    assert run(*files, "--passage-tokens", 40)[0] == 0
    assert ids(fake.prompts()[before:]) == ["two.txt#1", "two.txt#2"]


def test_files_of_one_name_are_told_apart(fake, run, tmp_path):
    same = [tmp_path / folder / "same.txt" for folder in "ab"]
    for file in same:
        file.parent.mkdir()
        file.write_text(f"In {file.parent.name}.")
    run(*same, "--whole")
    assert ids(fake.prompts()) == sorted(map(str, same))


def test_no_passage_is_longer_than_the_server_takes(fake, run, files):
    fake.max_model_len = 50
    assert run(*files, "--system-prompt", SYSTEM, "--passage-tokens", 1000)[0] == 0
    assert all(len(body["prompt"]) <= 49 for body in fake.prompts())
    fake.max_model_len = 60
    status, _, figures = run(*files, "--whole")
    assert status == 1
    assert figures["files"][0]["error"] is None
    assert figures["files"][1]["error"] == "two.txt has 86 tokens; allowed: 58"


def test_a_system_prompt_that_leaves_no_room_is_refused(fake, run, files):
    fake.max_model_len = 23
    assert run(files[0])[0] == 0
    with pytest.raises(RagKVError, match="the system prompt has 7 tokens; allowed: 17 less than the 23 of toy"):
        run(files[0], "--system-prompt", SYSTEM)
    fake.max_model_len = None
    assert run(files[0], "--system-prompt", SYSTEM, "--whole")[0] == 1  # the server then says what it takes


def test_a_server_without_ragkv_is_noted_and_nothing_goes_into_the_journal(fake, run, files, journal):
    fake.reports = False
    status, shown, figures = run(*files)
    assert status == 0 and not figures["reported"]
    assert f"{fake.url} does not say what it stores" in shown
    assert not journal.exists()
    fake.reports = True
    assert "does not say" not in run(*files)[1]
    assert "does not say" not in run(*files)[1]  # when nothing is sent, nothing can be said


@pytest.mark.parametrize(
    ("report", "is_kept"),
    [
        ({"stored_tokens": 64, "hit_tokens": 0}, True),
        ({"stored_tokens": 63, "hit_tokens": 99}, False),  # not all of it
        ({"stored_tokens": 7, "hit_tokens": 7}, False),  # just the system prompt
        ({"stored_tokens": -1, "hit_tokens": "8"}, False),
        ({}, False),
    ],
)
def test_only_what_the_server_kept_is_known_the_next_time(fake, run, files, journal, report, is_kept):
    fake.answers["/v1/completions"] = lambda body: (200, {"kv_transfer_params": {"ragkv": report}})
    status, _, figures = run(files[0], "--system-prompt", SYSTEM, "--whole")
    assert status == 0 and figures["reported"] and figures["system_tokens"] == 7
    assert {len(body["prompt"]) for body in fake.prompts()} == {64}
    assert journal.exists() == is_kept


def test_a_server_that_does_not_know_yet_is_asked_again(fake, run, files):
    """Stores end behind the answer: what it tells then is what it had before."""
    fake.late = True
    status, _, figures = run(*files, "--passage-tokens", 40, "--concurrency", 1)
    assert status == 0 and len(fake.prompts()) == 2 * 5
    hit, stored = (sum(each[name] for each in figures["files"]) for name in ("hit_tokens", "stored_tokens"))
    assert hit < stored
    run(*files, "--passage-tokens", 40)
    assert len(fake.prompts()) == 2 * 5, "all are known now"


def test_what_a_server_does_not_keep_is_sent_again_the_next_time(fake, run, files, journal):
    fake.keeps = False
    status, _, figures = run(files[0], "--whole")
    assert status == 0 and figures["files"][0]["stored_tokens"] == 0
    assert len(fake.prompts()) == ASKED and not journal.exists()
    fake.keeps = True
    assert run(files[0], "--whole")[2]["files"][0]["known"] == 0 and journal.exists()


def test_a_server_that_is_not_there_is_one_error(files, journal, monkeypatch):
    with serving() as gone:
        url = gone.url
    result = CliRunner().invoke(app, ["ingest", str(files[0]), "--url", url, "--journal", str(journal)])
    assert result.exit_code == 1 and isinstance(result.exception, RagKVError)
    assert "/v1/models: " in str(result.exception)


def test_a_key_comes_from_the_environment(fake, run, files, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    assert "secret" not in run(files[0])[1]
    assert {headers.get("Authorization") for _, _, headers in fake.asked} == {"Bearer secret"}


def test_the_journal_stands_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_journal() == tmp_path / "ragkv" / "ingest.jsonl"


def passage(number):
    return Passage(f"file#{number}", "text", 5, f"key {number}")


@pytest.mark.parametrize("harm", [b"", b'{"key": "ke', b"\xff\x00", b"[]\n3\n{}\n" + b'{"key": []}', b"\n\n"])
def test_a_journal_survives_lines_that_a_crash_left(journal, harm):
    first = Journal(journal)
    first.add(passage(1))
    journal.write_bytes(journal.read_bytes() + harm)
    second = Journal(journal)
    assert "key 1" in second and "key 2" not in second
    second.add(passage(2))
    second.add(passage(3))
    third = Journal(journal)
    assert all(f"key {number}" in third for number in (1, 2, 3))


def counter(tokenizer):
    return lambda text: len(tokenizer.encode(rag.closed(text)))


@settings(deadline=None, max_examples=300)
@given(st.text("abc .\n\n\n?", max_size=400), st.integers(3, 40))
def test_pieces_hold_the_whole_text_and_fit(text, limit):
    count = counter(ToyTokenizer())
    pieces = list(cut(text, count, limit))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    spans, at = [], 0
    for piece in pieces:
        assert piece.strip() and piece == piece.rstrip() and count(piece) <= limit
        start = text.index(piece, at)
        spans.append((start, at := start + len(piece)))
    for (start, _), (_, end) in itertools.pairwise(spans):
        assert count(text[start:end]) > limit


def test_paragraphs_stay_together_as_long_as_they_fit():
    count = counter(ToyTokenizer())
    paragraphs = [f"{number} {PARAGRAPH}".strip() for number in range(7)]
    text = "\n \n\n".join(paragraphs)
    two = count(text[: text.index("2 A")])
    assert list(cut(text, count, two)) == ["\n \n\n".join(paragraphs[at : at + 2]) for at in range(0, 7, 2)]
    assert list(cut(text, count, two - 1)) == paragraphs
    assert list(cut(text, count, count(text))) == [text]
    assert list(cut("", count, 9)) == list(cut(" \n\n\t", count, 9)) == []


@pytest.mark.parametrize(
    ("unit", "glue"), [("Some. words {}", "\n"), ("Some words {}.", " "), ("Is it {}?", " "), ("word{}", " ")]
)
def test_a_long_paragraph_is_cut_where_lines_sentences_or_words_end(unit, glue):
    units = [unit.format(number) for number in range(64)]
    text = glue.join(units)
    pieces = list(cut(text, counter(ToyTokenizer()), 30))
    assert glue.join(pieces) == text and len(pieces) > 2
    assert all(piece.endswith(tuple(units)) for piece in pieces)
    middle = list(cut("one two three four five six seven eight", counter(ToyTokenizer()), 5))
    assert middle == ["one two three four", "five six seven eight"]
    assert len(list(cut("x" * 99, len, 30))) == 4


def test_counting_does_not_grow_with_the_square_of_a_text():
    counted = 0

    def count(text):
        nonlocal counted
        counted += len(text)
        return len(text.split()) + 1

    text = "\n\n".join([PARAGRAPH.strip()] * 2000)
    assert len(list(cut(text, count, 4000))) < 8
    assert counted < 8 * len(text)


@pytest.mark.parametrize(
    ("name", "found"), [(None, ("base", 100)), ("base", ("base", 100)), ("adapter", ("adapter", 100))]
)
def test_the_model_is_the_first_unless_named(fake, name, found):
    cards = [{"id": "base", "max_model_len": 100}, {"id": "adapter", "max_model_len": None}]
    assert served(cards, name) == found
    assert served([{"id": "base"}], None) == ("base", None)
    with pytest.raises(RagKVError, match="--model = 'big'; allowed: toy, toy-lora"):
        Ingest(rag.Server(fake.url, "big"), "", 512, lambda key: False)
