"""`bench answers` without an engine: what is asked in which order, the report, and how a run goes on."""

import json
import re

import pytest

from fusion_bench_tools import Words
from ragkv import cli
from ragkv.benchmarks.internal import answers
from ragkv.benchmarks.internal.answers import Options, measure, summarize
from ragkv.benchmarks.internal.answers_journal import Journal
from ragkv.benchmarks.internal.answers_questions import build, draft
from ragkv.benchmarks.internal.commands import app
from ragkv.benchmarks.internal.fusion_measure import Reply

SIZES = ["--passages", 3, "--passage-tokens", 700]
FEW = ["--selections", "none,query", "--ratios", "0.1,0.3"]
SETTINGS = [("full", 1.0), ("ordered", 0.0), ("none", 0.0), ("query", 0.1), ("query", 0.3)]


class FakeEngine:
    """Notes what is asked of it. It answers "alpha" where 0.3 is computed again or nothing is moved, else "beta".
    `dies_after`: so many questions, as their first request comes."""

    def __init__(self, log=None, dies_after=None):
        self.log = [] if log is None else log
        self._left = dies_after

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def evict(self, *, ragkv_too=False):
        if ragkv_too and self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        self.log.append(("evict", ragkv_too))

    def call(self, function, prompt, max_tokens, arguments, salt, stop):
        asked = arguments["kv_transfer_params"]["ragkv"]
        self.log.append(("ask", prompt, max_tokens, asked, salt, stop))
        ratio = asked.get("recompute_ratio", 1.0)
        text = "alpha\n\nbeta" if ratio >= 0.3 else "beta"
        return Reply(0.5 + ratio, Words().encode(text, False), len(prompt) if "fuse" in asked else 0)


def asked_of(number=0):
    return build(Words(), number, draft(number, 3, 700), 700)


def requests(engine):
    return [entry[1:] for entry in engine.log if entry[0] == "ask"]


def test_passages_are_stored_alone_and_as_a_chain_that_fusion_cannot_find():
    engine, asked = FakeEngine(), asked_of()
    measure(engine, Words(), asked, SETTINGS)
    stored = requests(engine)[:4]
    alone = [[*asked.trial.system, *passage] for passage in asked.trial.passages]
    assert [(prompt, tokens, salt) for prompt, tokens, _, salt, _ in stored[:3]] == [(p, 1, None) for p in alone]
    chain, tokens, _, salt, _ = stored[3]
    assert tokens == 1 and salt is not None
    assert chain == asked.stored.prompt[: -len(asked.stored.question)]
    ordered = requests(engine)[5]
    assert ordered[0] == asked.stored.prompt and ordered[3] == salt and ordered[2]["fuse"] is False
    assert engine.log[0] == ("evict", True) and ("evict", True) not in engine.log[1:]
    asks = [n for n, entry in enumerate(engine.log) if entry[0] == "ask"]
    assert all(engine.log[n - 1][0] == "evict" for n in asks), "vLLM's own cache is empty before each"


def test_every_setting_is_asked_with_short_answers_in_either_order():
    asked = asked_of()
    for backwards in (False, True):
        engine = FakeEngine()
        row = measure(engine, Words(), asked, SETTINGS, backwards=backwards)
        assert [(each["selection"], each["ratio"]) for each in row["rows"]] == SETTINGS
        told = [
            (hints.get("selection"), hints.get("recompute_ratio"), tokens, stop)
            for _, tokens, hints, _, stop in requests(engine)[4:]
        ]
        expected = [(None, None), (None, None), ("first_tokens", 0.0), ("query", 0.1), ("query", 0.3)]
        expected = [(*each, 24, "\n") for each in expected]
        assert told == (expected[::-1] if backwards else expected)
        full = requests(engine)[-1 if backwards else 4]
        assert full[0] == asked.trial.prompt and full[3].startswith("full prefill")


def test_a_question_is_kept_with_its_answers_up_to_the_line_s_end():
    asked = asked_of()
    row = measure(FakeEngine(), Words(), asked, SETTINGS)
    assert (row["number"], row["kind"], row["question"]) == (0, "lookup", asked.text)
    assert row["known"] == list(asked.answers) and row["prompt_tokens"] == len(asked.trial.prompt)
    assert [each["answer"] for each in row["rows"]] == ["alpha", "alpha", "beta", "beta", "alpha"]
    assert [each["reused"] for each in row["rows"]] == [0, 1, 1, 1, 1]


# --- the summary ---


def question(number, kind, known, *rows):
    names = [("full", 1.0), ("none", 0.0)]
    made = [
        {"selection": name, "ratio": ratio, "answer": answer, "ttft_s": ttft, "reused": 0.5}
        for (name, ratio), (answer, ttft) in zip(names, rows, strict=True)
    ]
    return {"number": number, "kind": kind, "known": [known], "rows": made, "prompt_tokens": 9, "seconds": 1.0}


def test_scores_are_compared_question_by_question():
    asked = [
        question(0, "lookup", "12", ("12", 2.0), ("$12", 1.0)),
        question(1, "sum", "1,000", ("1000", 4.0), ("7", 1.0)),
        question(2, "sum", "red fox", ("fox", 8.0), ("FOX.", 6.0)),
        question(3, "sum", "5", ("6", 2.0), ("5", 1.0)),
    ]
    full, none = summarize(asked)
    assert (full["exact"], none["exact"], none["exact_difference"]) == (0.5, 0.5, 0)
    assert full["f1"] == none["f1"] == pytest.approx((1 + 1 + 2 / 3) / 4)
    assert full["f1_by_kind"] == {"lookup": 1, "sum": pytest.approx((1 + 2 / 3) / 3)}
    assert (full["agreement"], none["agreement"]) == (1, 0.5)
    assert (full["f1_difference_range"], full["ttft_ratio_range"]) == ((0, 0), (1, 1))
    low, high = none["f1_difference_range"]
    assert -1 <= low < 0 < high <= 1
    assert none["f1_range"] == (pytest.approx(full["f1"] + low), pytest.approx(full["f1"] + high))
    assert (none["ttft_s"], none["ttft_ratio"], none["reused"]) == (1, 0.5, 0.5)


# --- the journal ---


def test_a_journal_goes_on_where_it_was_cut_off(tmp_path):
    file = tmp_path / "new" / "finished.jsonl"
    journal = Journal(file, {"seed": 1, "sizes": (1, 2)})
    for number in (0, 1):
        journal.add({"number": number, "rows": []})
    with file.open("a") as lines:
        lines.write('{"number": 2, "ro')
    again = Journal(file, {"seed": 1, "sizes": (1, 2)})
    assert sorted(again.finished) == [0, 1]
    again.add({"number": 2, "rows": [3]})
    assert Journal(file, {"seed": 1, "sizes": (1, 2)}).finished[2] == {"number": 2, "rows": [3]}
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("begun", ["", '{"sett', '{"settings": {"seed": 1'])
def test_a_journal_cut_off_in_its_first_line_is_begun_anew(tmp_path, begun):
    file = tmp_path / "finished.jsonl"
    file.write_text(begun)
    Journal(file, {"seed": 1}).add({"number": 0})
    assert Journal(file, {"seed": 1}).finished == {0: {"number": 0}}


@pytest.mark.parametrize(
    ("was", "now", "field", "values"),
    [
        ({"seed": 1, "model": "m"}, {"seed": 2, "model": "m"}, "seed", "1, this one has 2"),
        ({"seed": 1}, {"seed": 1, "model": "m"}, "model", "None, this one has 'm'"),
        ({"seed": 1, "model": "m"}, {"seed": 1}, "model", "'m', this one has None"),
    ],
)
def test_other_settings_are_refused_and_the_file_stays(tmp_path, was, now, field, values):
    file = tmp_path / "finished.jsonl"
    Journal(file, was).add({"number": 0})
    before = file.read_bytes()
    with pytest.raises(ValueError, match=re.escape(f"{file} is of a run with {field} = {values}")):
        Journal(file, now)
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", ["a letter", "a letter\n", '{"number": 0}\n', "[1]\n", "7\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    file = tmp_path / "finished.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match="line 1: expected a JSON object with 'settings'"):
        Journal(file, {"seed": 1})
    assert file.read_text() == text


def test_a_bad_line_is_named(tmp_path):
    file = tmp_path / "finished.jsonl"
    Journal(file, {"seed": 1})
    with file.open("a") as lines:
        lines.write("{}\n")
    with pytest.raises(ValueError, match="line 2: expected a JSON object with 'number'"):
        Journal(file, {"seed": 1})


# --- the command ---


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Run the command without a model and an engine: its exit status, and what was asked."""
    import transformers

    monkeypatch.setattr(answers, "model_folder", lambda given, progress: tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Words())

    def start(*arguments, dies_after=None):
        log = []
        monkeypatch.setattr(answers, "Engine", lambda options: FakeEngine(log, dies_after))
        monkeypatch.setattr("sys.argv", ["internal", "answers", *map(str, [*SIZES, *FEW, *arguments])])
        with pytest.raises(SystemExit) as ended:
            cli.run(app)
        return ended.value.code or 0, log

    return start


def asked_in(log):
    """How many questions were asked, the warm-up too."""
    return sum(entry == ("evict", True) for entry in log)


def test_the_command_writes_its_figures(start, tmp_path, capsys):
    file, picture = tmp_path / "out" / "a.json", tmp_path / "out" / "a.png"
    code, log = start("--questions", 4, "--output", file, "--plot", picture)
    assert code == 0 and asked_in(log) == 5
    report = json.loads(file.read_text())
    assert [(row["selection"], row["ratio"]) for row in report["results"]] == SETTINGS
    assert (report["questions"], report["passages"], report["kinds"]["lookup"]) == (4, 3, 2)
    assert report["filings"] == "generated" and report["seconds_per_question"] > 0
    assert report["results"][3]["agreement"] == 0 and report["results"][4]["agreement"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "4 questions (2 lookup, 1 comparison, 1 sum)" in shown and "3 passages of 700 tokens" in shown
    assert re.search(r"a question takes \d+ s: 2 more, about \d+ minutes", shown)
    ratios = [entry[3].get("recompute_ratio") for entry in log if entry[0] == "ask" and entry[2] == 24]
    first, second = ratios[-20:-15], ratios[-15:-10]
    assert first == second[::-1] and None in first, "the order turns round"


def test_a_run_that_was_stopped_goes_on_and_may_ask_more(start, tmp_path, capsys):
    file, one, both = tmp_path / "finished.jsonl", tmp_path / "one.json", tmp_path / "both.json"
    code, _ = start("--questions", 3, "--finished", file, dies_after=3)
    assert code == 130 and len(file.read_text().splitlines()) == 1 + 2
    code, log = start("--questions", 3, "--finished", file)
    assert code == 0 and asked_in(log) == 2
    assert "2 of 3 questions are finished" in capsys.readouterr().out
    code, log = start("--questions", 4, "--finished", file, "--output", both)
    assert code == 0 and asked_in(log) == 2
    code, log = start("--questions", 4, "--finished", file, "--output", one)
    assert code == 0 and not log, "nothing is left to ask"
    assert json.loads(one.read_text()) == json.loads(both.read_text())
    start("--questions", 4, "--output", one)
    again, first = json.loads(one.read_text()), json.loads(both.read_text())
    assert again["results"] == first["results"], "as a run that was never stopped"


def test_other_settings_name_the_field(start, tmp_path, capsys):
    file = tmp_path / "finished.jsonl"
    assert start("--questions", 1, "--finished", file)[0] == 0
    capsys.readouterr()
    for option, value, told in (
        ("--seed", 5, "seed = 0, this one has 5"),
        ("--passages", 4, "passages = 3, this one has 4"),
        (
            "--ratios",
            "0.1",
            "settings = ['full 1', 'ordered 0', 'none 0', 'query 0.1', 'query 0.3'], this one has",
        ),
    ):
        code, log = start("--questions", 1, "--finished", file, option, value)
        assert code == 1 and not log
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{file} is of a run with {told}")


def test_real_filings_are_known_by_what_they_hold(tmp_path):
    (tmp_path / "one.txt").write_text("a 12 b")
    options = Options("none", "0.1", filings=tmp_path)
    first = options.describe(tmp_path)
    assert first == options.describe(tmp_path)
    (tmp_path / "one.txt").write_text("a 13 b")
    assert first["filings"] != options.describe(tmp_path)["filings"]


def test_settings_begin_with_what_others_are_compared_with():
    assert Options("none,query", "0.3,0.1").settings() == SETTINGS
    assert Options("full,deviation", "1,0.5").settings() == [*SETTINGS[:2], ("deviation", 0.5), ("deviation", 1)]
    with pytest.raises(ValueError, match="--selections = 'best'"):
        Options("best", "0.1").settings()


def test_what_cannot_be_is_refused_before_anything_starts(start, capsys):
    assert start("--selections", "best")[0] == 1
    assert start("--ratios", "2")[0] == 1
    capsys.readouterr()
    code, log = start("--passages", 20)
    assert code == 1 and not log
    assert "allowed: at most 8192" in capsys.readouterr().err
