"""`ragkv bench compare`: noise is no difference, a difference is found, files that are no reports are named."""

import json
import math

import numpy as np
import pytest

from ragkv import cli
from ragkv.benchmarks.serve_compare import compare, read_run, run
from ragkv.benchmarks.serve_noise import interval, widening
from ragkv.errors import ConfigError, RagKVError
from serve_tools import as_report, played, sample

TIMES = ["first_turn_ttft_s", "followup_ttft_s", "tpot_s", "e2e_s", "requests_per_s"]
SAME, WORSE, BETTER, UNKNOWN = "no difference", "worse", "better", "too few to tell"


def chats(rounds=6, sessions=4, turns=3, slower=1.0, seed=0, noise=0.02, prompt=0):
    """A run's samples: each request has a time of its own, and each run its noise."""
    own, random = np.random.default_rng(99), np.random.default_rng(seed)
    found = []
    for number in range(rounds):
        for session in range(sessions):
            for turn in range(1, turns + 1):
                ttft = (4.0 if turn == 1 else 0.1) * math.exp(own.normal(0, 0.2) + random.normal(0, noise))
                tpot = 0.03 * math.exp(random.normal(0, noise))
                times = {"ttft": ttft * slower, "tpot": tpot * slower, "started": turn * 5.0 * slower}
                found.append(sample(number, session, turn, prompt=prompt + 100 * turn, **times))
    return found


def saved(path, *systems, **more):
    path.write_text(json.dumps(as_report(*systems, **more)))
    return path


def compared(folder, old, new, tolerance=0.05):
    """The verdicts of the one common system, by figure; and the whole result."""
    paths = [saved(folder / f"{name}.json", *systems) for name, systems in (("old", old), ("new", new))]
    result = compare(*map(read_run, paths), tolerance)
    return {each["figure"]: each["verdict"] for each in result["systems"][0]["figures"]}, result


def test_a_run_is_no_different_from_itself_or_its_like(tmp_path):
    for seed in (0, 1):
        ours = [played(samples=chats(seed=seed))]
        verdicts, result = compared(tmp_path, [played(samples=chats())], ours)
        assert set(verdicts.values()) == {SAME} and not result["worse"] and result["paired"]
    assert list(verdicts) == [*TIMES, "errors", "hit_fraction"]


@pytest.mark.parametrize("slower, verdict", [(1.2, WORSE), (1 / 1.2, BETTER), (1.03, SAME)])
def test_a_run_that_is_slower_is_worse_in_every_time(tmp_path, slower, verdict):
    verdicts, result = compared(
        tmp_path, [played(samples=chats())], [played(samples=chats(slower=slower, seed=1), wall=10 * slower)]
    )
    assert [verdicts[name] for name in TIMES] == [verdict] * 5
    assert result["worse"] is (verdict == WORSE)
    figure = result["systems"][0]["figures"][1]
    assert figure["ratio"] == pytest.approx(slower, rel=0.02) and figure["low"] < figure["ratio"] < figure["high"]
    assert figure["new"] / figure["old"] == pytest.approx(slower, rel=0.05)


def test_the_tolerance_decides_what_counts(tmp_path):
    old, new = [played(samples=chats())], [played(samples=chats(slower=1.2, seed=1))]
    assert compared(tmp_path, old, new, 0.1)[0]["followup_ttft_s"] == WORSE
    assert compared(tmp_path, old, new, 0.3)[0]["followup_ttft_s"] == SAME
    with pytest.raises(ConfigError, match=r"tolerance = -0.1; allowed: shares from 0"):
        compared(tmp_path, old, new, -0.1)


def test_errors_and_hits_are_told(tmp_path):
    failed = [*chats()[:-1], sample(5, 3, 3, error="gone")]
    verdicts, result = compared(
        tmp_path, [played(samples=chats(), hits={"host": 900})], [played(samples=failed, hits={"host": 800})]
    )
    assert (verdicts["errors"], verdicts["hit_fraction"]) == (WORSE, WORSE) and result["worse"]
    verdicts, _ = compared(
        tmp_path, [played(samples=failed, hits={"host": 800})], [played(samples=chats(), hits={"host": 840})]
    )
    assert (verdicts["errors"], verdicts["hit_fraction"]) == (BETTER, SAME)


def test_more_errors_of_more_requests_are_no_worse(tmp_path):
    few = [*chats(rounds=6)[:-1], sample(5, 3, 3, error="gone")]
    twice = [*chats(rounds=12)[:-2], sample(11, 3, 2, error="gone"), sample(11, 3, 3, error="gone")]
    assert compared(tmp_path, [played(samples=few)], [played(samples=twice)])[0]["errors"] == SAME
    assert compared(tmp_path, [played(samples=twice)], [played(samples=few[:-2] + few[-1:])])[0]["errors"] == WORSE


def test_other_settings_are_told(tmp_path, capsys):
    old = saved(tmp_path / "old.json", played(samples=chats()), config={"memory_bytes": 1, "dtype": "x"})
    new = saved(tmp_path / "new.json", played(samples=chats()), config={"memory_bytes": 2, "dtype": "x"})
    assert compare(read_run(old), read_run(new))["config_differs_in"] == ["memory_bytes"]
    assert run(old, new) == 0 and "The runs were asked for other memory_bytes." in capsys.readouterr().out


def test_few_requests_prove_nothing(tmp_path):
    few = {"rounds": 1, "sessions": 4, "turns": 2}
    verdicts, result = compared(
        tmp_path, [played(samples=chats(**few))], [played(samples=chats(**few, slower=3, seed=1))]
    )
    assert verdicts["first_turn_ttft_s"] == verdicts["requests_per_s"] == UNKNOWN
    assert verdicts["e2e_s"] == WORSE  # of eight
    unknown = result["systems"][0]["figures"][0]
    assert unknown["low"] is None and unknown["ratio"] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("change", ["shape", "texts", "lengths"])
def test_runs_that_asked_something_else_are_compared_without_pairs(tmp_path, change):
    config = {"shape": {"turns": 9}, "texts": {"texts": "mine"}}.get(change, {})
    old = saved(tmp_path / "old.json", played(samples=chats()))
    again = chats(seed=1, prompt=7 if change == "lengths" else 0, slower=1.5)
    new = saved(tmp_path / "new.json", played(samples=again), config=config)
    result = compare(read_run(old), read_run(new))
    assert not result["paired"]
    figures = {figure["figure"]: figure for figure in result["systems"][0]["figures"]}
    assert figures["tpot_s"]["verdict"] == WORSE and figures["tpot_s"]["ratio"] == pytest.approx(1.5, rel=0.1)


def test_pairs_see_what_sets_of_requests_hide(tmp_path):
    old = {(0, n, 2): float(n) for n in range(40)}
    new = {key: value + 0.2 for key, value in old.items()}
    assert interval(old, new, True).low > 0.19
    assert interval(old, new, False).low < 0
    assert interval(old, {(1, 0, 0): 1.0}, True) is None


def test_only_common_systems_are_compared_and_other_environments_told(tmp_path, capsys):
    old = saved(tmp_path / "old.json", played("plain", chats()), played("ragkv", chats()))
    new = saved(tmp_path / "new.json", played("ragkv", chats()), played("x", chats()), environment={"vllm": "1"})
    result = compare(read_run(old), read_run(new))
    assert [system["system"] for system in result["systems"]] == ["ragkv"]
    assert result["environment_differs_in"] == ["vllm"]
    assert run(old, new) == 0
    out = capsys.readouterr().out
    assert "no difference" in out and "The environments differ in vllm." in out
    lonely = saved(tmp_path / "lonely.json", played("y", chats()))
    with pytest.raises(RagKVError, match=r"lonely.json has no system of .*old.json: it has y, not plain, ragkv"):
        compare(read_run(old), read_run(lonely))


@pytest.mark.parametrize(
    "text, wrong",
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "is no report of `ragkv bench serve`"),
        ('{"systems": []}', "is no report of `ragkv bench serve`"),
        ('{"systems": [{"system": "x"}], "config": {}, "environment": {}}', "is no report"),
        ('{"systems": 3, "config": {}, "environment": {}}', "is no report"),
        (b"\xff" * 500, "is no report of `ragkv bench serve`: UnicodeDecodeError"),
    ],
)
def test_a_file_that_is_no_report_is_named_in_one_line(tmp_path, text, wrong):
    path = tmp_path / "bad.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RagKVError, match=rf"bad.json {wrong}") as raised:
        read_run(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize("name, value", [("ttft_s", "quick"), ("started_s", None), ("turn", [1])])
def test_samples_must_hold_numbers(tmp_path, name, value):
    made = as_report(played(samples=chats(1)))
    made["systems"][0]["samples"][0][name] = value
    (tmp_path / "bad.json").write_text(json.dumps(made))
    with pytest.raises(RagKVError, match=rf"bad.json is no report .*{name} = "):
        read_run(tmp_path / "bad.json")


def test_the_command_ends_with_the_status(tmp_path, monkeypatch, capsys):
    old = saved(tmp_path / "old.json", played(samples=chats()))
    new = saved(tmp_path / "new.json", played(samples=chats(slower=1.5)))
    file, none = tmp_path / "out" / "compare.json", tmp_path / "none"
    better = [new, old, "--fail", "--json", file]
    for arguments, status in (([old, new, "--fail"], 3), ([old, new], 0), (better, 0), ([old, none], 1)):
        monkeypatch.setattr("sys.argv", ["ragkv", "bench", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0) == status
    said = capsys.readouterr()
    assert "worse" in said.out and "none cannot be read" in said.err
    written = json.loads(file.read_text())
    assert written["paired"] and not written["worse"]
    assert written["systems"][0]["figures"][0]["verdict"] == BETTER


# --- how often noise is taken for a difference ---


def noisy(random, own, slower=1.0):
    """Logarithms of a run's times, [rounds, requests]: the machine a little faster or slower over the whole run,
    another little from round to round, and requests with heavy tails, some more than twice as long."""
    rounds, requests = own.shape
    drift = random.normal(0, 0.02) + np.cumsum(random.normal(0, 0.01, rounds))[:, None]
    tails = 0.05 * random.standard_t(3, own.shape) + (random.random(own.shape) < 0.03) * math.log(2.5)
    times = own + drift + tails + math.log(slower)
    return {(r, n, 0): float(times[r, n]) for r in range(rounds) for n in range(requests)}


def found(rounds, slower, paired, pairs=200):
    """How many of so many pairs of runs differ beyond 5%."""
    random, differ = np.random.default_rng(1), 0
    for _ in range(pairs):
        own = random.normal(0, 0.1, (rounds, 16))
        between = interval(noisy(random, own), noisy(random, own, slower), paired)
        differ += between.low > math.log1p(0.05) or between.high < -math.log1p(0.05)
    return differ


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("rounds", [1, 3, 5, 8])
def test_noise_is_hardly_ever_a_difference(rounds, paired):
    assert found(rounds, 1.0, paired) <= 6


@pytest.mark.parametrize("rounds, at_least", [(1, 130), (3, 180), (8, 180)])
def test_a_fifth_more_time_is_found(rounds, at_least):
    assert found(rounds, 1.2, True) >= at_least


def test_few_blocks_widen_the_interval_as_students_distribution_does():
    expected = {5: 4.604, 6: 4.032, 8: 3.499, 12: 3.106, 30: 2.756}  # its 99.5% quantiles of n - 1
    for count, student in expected.items():
        assert widening(count) == pytest.approx(student / 2.576 * math.sqrt(count / (count - 1)), rel=0.02)
