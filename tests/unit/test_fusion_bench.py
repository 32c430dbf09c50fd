"""`internal fusion` without an engine: what is asked in which order, what a row holds, the report."""

import json
from types import SimpleNamespace

import pytest

from fusion_bench_tools import Words
from ragkv import cli
from ragkv.benchmarks.internal import fusion, fusion_measure, fusion_quality
from ragkv.benchmarks.internal.commands import app
from ragkv.benchmarks.internal.fusion_measure import Full, Reply, hints, measure, prefill, store, work
from ragkv.benchmarks.internal.fusion_quality import Divergence
from ragkv.benchmarks.internal.fusion_trials import Trial
from ragkv.connectors.vllm.hints import read_hints
from ragkv.kvstore.fusion.selection import Look


def test_the_hints_are_read_by_the_connector():
    trial = Trial("t", [1, 2], [[3, 4], [5]], [6], [[1, 2], [1, 2]])
    asked = hints(trial, "deviation", 0.3)
    assert asked["documents"] == [{"id": "t#0", "start": 2, "end": 4}, {"id": "t#1", "start": 4, "end": 5}]
    assert (asked["fuse"], asked["selection"], asked["recompute_ratio"]) == (True, "deviation", 0.3)
    assert hints(trial, "none", 0.3)["recompute_ratio"] == 0
    read = read_hints({"ragkv": asked})
    assert not read.problems and read.boundaries == (2, 4, 5)
    for wrong in ("full", "best"):
        with pytest.raises(ValueError, match=f"selection = '{wrong}'; allowed: none, "):
            hints(trial, wrong, 0.3)


# --- what is asked ---


class FakeEngine:
    """Notes what is asked of it. The answer to a fused prompt ends with the selection's budget."""

    def __init__(self, log=None):
        self.log = [] if log is None else log

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def evict(self, *, ragkv_too=False):
        self.log.append(("evict", ragkv_too))

    def call(self, function, *args):
        if function is fusion_measure.compare:
            self.log.append(("compare", args))
            return Divergence([0.25, 0.75], [True, False], [0.5, 0.25])
        prompt, max_tokens, arguments, salt, _ = args
        self.log.append(("ask", prompt, max_tokens, arguments, salt))
        asked = arguments["kv_transfer_params"]["ragkv"]
        ratio = asked.get("recompute_ratio")
        if ratio is None:
            return Reply(2.0, tuple(range(max_tokens)), 0)
        told = [{**span, "decision": "moved", "reused_tokens": 10} for span in asked["documents"]]
        tokens = tuple(range(max_tokens)) if ratio > 0.1 else (99,)
        return Reply(0.5 + ratio, tokens, len(prompt) - 5, {"documents": told})


TRIAL = Trial("t", [1] * 5, [[2] * 10, [3] * 10], [4] * 5, [[8] * 2, [9] * 3])


def asked(engine):
    return [entry for entry in engine.log if entry[0] == "ask"]


def test_passages_are_stored_behind_what_they_are_behind_after_forgetting_all():
    engine = FakeEngine()
    store(engine, TRIAL)
    assert engine.log[0] == ("evict", True)
    assert ("evict", True) not in engine.log[1:]
    assert [(prompt, salt) for _, prompt, _, _, salt in asked(engine)] == [
        ([8] * 2 + [2] * 10, None),
        ([9] * 3 + [3] * 10, None),
    ]
    documents = [arguments["kv_transfer_params"]["ragkv"]["documents"] for _, _, _, arguments, _ in asked(engine)]
    assert documents == [[{"id": "t#0", "start": 2, "end": 12}], [{"id": "t#1", "start": 3, "end": 13}]]


@pytest.mark.parametrize("continuation", [None, [7, 8, 9]])
def test_full_prefill_keeps_to_namespaces_of_its_own(continuation):
    engine = FakeEngine()
    trial = Trial(TRIAL.name, TRIAL.system, TRIAL.passages, TRIAL.question, TRIAL.behind, continuation)
    full = prefill(engine, trial, 4)
    expected = tuple(range(4)) if continuation is None else (7, 8, 9)
    assert full == Full(2.0, tuple(range(16)), expected)
    measure(engine, trial, "full", 1.0, full)
    salts = [salt for _, _, _, _, salt in asked(engine)]
    assert None not in salts and len(set(salts)) == 3
    forced = [arguments.get(fusion_quality.FORCE) for _, _, _, arguments, _ in asked(engine)]
    assert forced == [None, list(expected), list(expected)]
    assert all("fuse" not in arguments["kv_transfer_params"]["ragkv"] for _, _, _, arguments, _ in asked(engine))


def test_a_row_has_quality_time_and_work():
    engine = FakeEngine()
    row = measure(engine, TRIAL, "deviation", 0.3, Full(2.0, tuple(range(16)), (5, 6)), layers=10)
    assert row.pop("work") == pytest.approx((5 + 5 + 6 + 25 * 1.5 / 10) / 30)
    quality = {"kl": 0.5, "top1": 0.5, "delta_nll": 0.375, "answer_equal": True}
    times = {"ttft_s": 0.8, "full_ttft_s": 2.0, "reused": 1.0}
    assert row == {"selection": "deviation", "ratio": 0.3} | quality | times
    assert [entry[:2] for entry in engine.log if entry[0] == "evict"] == [("evict", False)] * 2
    assert [entry[0] for entry in engine.log] == ["evict", "ask", "evict", "ask", "compare"]
    timed, forced = asked(engine)
    assert fusion_quality.FORCE not in timed[3] and timed[2] == 16
    assert forced[3][fusion_quality.FORCE] == [5, 6] and forced[2] == 2
    assert timed[3]["kv_transfer_params"] == forced[3]["kv_transfer_params"]
    assert measure(engine, TRIAL, "none", 0.0, Full(2.0, tuple(range(16)), (5, 6)))["answer_equal"] is False


def document(decision, reused):
    return {"id": "t#0", "start": 5, "end": 15, "decision": decision, "reused_tokens": reused}


@pytest.mark.parametrize(
    ("selection", "ratio", "told", "cached", "expected"),
    [
        ("full", 1, [], 0, 30),
        ("deviation", 0.5, [], 5, 25),
        ("deviation", 0.5, [document("missing", 0)], 5, 25),
        ("deviation", 0.5, [document("reused", 10)], 15, 15),
        ("none", 0, [document("moved", 10), document("moved", 10)], 25, 5),
        ("first_tokens", 0.5, [document("moved", 10), document("moved", 10)], 25, 5 + 10),
        ("random", 0.5, [document("reused", 10), document("moved", 10)], 25, 5 + 5),
        ("random", 0.5, [document("moved", 8)], 25, 5 + 12 + 4),
        ("deviation", 0.5, [document("moved", 8)], 25, 5 + 12 + 4 + 20 * 3.5 / 10),
        ("deviation", 1, [document("moved", 20)], 25, 25),
        ("none", 0, [document("moved", 20)], 25, 5),
        ("query", 0.5, [document("moved", 20)], 25, 5 + 10 + 5),
        ("none", 0, [document("moved", 10)], 15, 15),
    ],
)
def test_work_counts_token_layers(monkeypatch, selection, ratio, told, cached, expected):
    early = SimpleNamespace(looks_at=Look.EARLY_KEYS, looking=lambda layers: 3.5 / layers)
    question = SimpleNamespace(looks_at=Look.QUESTION, looking=lambda layers: 0.0)
    monkeypatch.setattr(fusion_measure, "CHOOSERS", {"deviation": early, "query": question})
    trial = Trial("t", [1] * 5, [[2] * 10, [3] * 10], [4] * 5, [[1] * 5] * 2)
    found = work(trial, selection, ratio, Reply(1, (), cached, {"documents": told}), layers=10)
    assert found == pytest.approx(expected / 30)


# --- the report ---


def test_settings_come_in_order_and_hold_the_check():
    assert fusion.parse_settings("full, query,none,deviation", "0.3,.05") == [
        ("none", 0.0),
        ("deviation", 0.05),
        ("deviation", 0.3),
        ("deviation", 1.0),
        ("query", 0.05),
        ("query", 0.3),
        ("full", 1.0),
    ]
    assert fusion.parse_settings("random", "1") == [("random", 1.0)]


def row(selection, ratio, kl, ttft, full):
    made = {"selection": selection, "ratio": ratio, "kl": kl, "ttft_s": ttft, "full_ttft_s": full}
    return made | {"answer_equal": kl < 0.2, "top1": 1.0, "delta_nll": 0.0, "work": 0.3, "reused": 1.0}


def test_times_are_compared_within_a_trial():
    trials = [[row("none", 0.0, kl, ttft, full)] for kl, ttft, full in ((0.1, 1, 2), (0.2, 9, 10), (0.3, 1, 4))]
    (result,) = fusion.summarize(trials)
    assert (result["ttft_s"], result["full_ttft_s"], result["ttft_ratio"]) == (1, 4, 0.5)
    assert result["kl"] == pytest.approx(0.2)
    assert result["kl_error"] == pytest.approx(0.1 / 3**0.5)
    assert result["answer_equal"] == pytest.approx(1 / 3)
    assert fusion.summarize(trials[:1])[0]["kl_error"] == 0


@pytest.fixture
def no_engine(monkeypatch, tmp_path):
    """The command without a model and an engine; gives the log of what is asked."""
    import transformers

    log = []
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    monkeypatch.setattr(fusion, "ensure_model", lambda progress: tmp_path)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda model: Words())
    monkeypatch.setattr(fusion, "Engine", lambda options: FakeEngine(log))
    return log


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["internal", "fusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(app)
    return ended.value.code or 0


def test_the_command_writes_its_figures(monkeypatch, tmp_path, capsys, no_engine):
    file, picture = tmp_path / "out" / "fusion.json", tmp_path / "out" / "fusion.png"
    sizes = ["--passages", 3, "--tokens", 64, "--trials", 2, "--continuation", 8]
    assert run(monkeypatch, *sizes, "--text", "running", "--json", file, "--plot", picture) == 0
    report = json.loads(file.read_text())
    wanted = {"selection", "ratio", "kl", "top1", "delta_nll", "ttft_s", "full_ttft_s", "work"}
    assert all(wanted <= result.keys() for result in report["results"])
    assert [(result["selection"], result["ratio"]) for result in report["results"]] == fusion.parse_settings(
        ",".join(fusion.SELECTIONS), "0.05,0.15,0.3"
    )
    assert (report["trials"], report["passages"], report["text"], report["stored"]) == (2, 3, "running", "prefix")
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "3 passages of 64 tokens (running, stored prefix)" in shown
    assert sum(entry == ("evict", True) for entry in no_engine) == 3, "two trials, and one to warm up"
    fused = [each["recompute_ratio"] for each in map(_hints, no_engine) if "recompute_ratio" in each]
    warm = len(report["results"]) - 1  # each setting once, but full prefill
    each_trial = (len(fused) - warm) // 2
    first, second = fused[warm : warm + each_trial], fused[warm + each_trial :]
    assert first == second[::-1] and first[0] == 0, "the order turns round"


def _hints(entry):
    return entry[3]["kv_transfer_params"]["ragkv"] if entry[0] == "ask" else {}


def test_settings_that_did_not_fuse_are_told(monkeypatch, tmp_path, capsys, no_engine):
    monkeypatch.setattr(FakeEngine, "call", _without_fusion(FakeEngine.call))
    assert run(monkeypatch, "--trials", 1, "--selections", "none,full", "--tokens", 64) == 0
    assert "1 of 2 settings reused less than half of the passages" in capsys.readouterr().out


def _without_fusion(call):
    def replaced(self, function, *args):
        found = call(self, function, *args)
        return found if isinstance(found, Divergence) else Reply(found.ttft_s, found.tokens, 5)

    return replaced


SELECTIONS = "none, random, first_tokens, deviation, query, query_deviation, full"


@pytest.mark.parametrize(
    ("option", "values", "allowed"),
    [
        ("--selections", ["best", ""], SELECTIONS),
        ("--ratios", ["0.1,x", "0", "1.5", "nan"], "numbers above 0, at most 1, with commas between"),
        ("--stored", ["here"], "prefix, elsewhere, alone"),
        ("--text", ["poem"], "questions, running"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(monkeypatch, capsys, option, values, allowed):
    for value in values:
        assert run(monkeypatch, option, value) == 1
        assert capsys.readouterr().err == f"{option} = {value!r}; allowed: {allowed}\n"


def test_prompts_that_are_too_long_are_refused(monkeypatch, capsys, no_engine):
    assert run(monkeypatch, "--passages", 20, "--tokens", 500) == 1
    assert "allowed: at most 8192" in capsys.readouterr().err
    assert not no_engine
