"""`ragkv ingest --retrievals`: passages are stored in the orders in which they will be asked for."""

import itertools
import json
from random import Random

import pytest
from typer.testing import CliRunner

from ragkv import rag
from ragkv.chains import LONGEST, likely_chains, read_retrievals
from ragkv.cli import app
from ragkv.errors import RagKVError

SYSTEM = "Answer from the passages."
TEXTS = {
    f"{name}.txt": f"Passage {name} says {name} {number} times, and then says once more what it has said before."
    for number, name in enumerate("abcd")
}


@pytest.fixture
def ingest(fake, tmp_path, monkeypatch):
    """Run `ragkv ingest` over all texts, with a log; exit status, what was shown, and the log's figures."""
    monkeypatch.setenv("COLUMNS", "200")
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)

    def run(log, *more):
        file, figures = tmp_path / "log.jsonl", tmp_path / "figures.json"
        file.write_text(log if isinstance(log, str) else "".join(json.dumps(each) + "\n" for each in log))
        given = [
            "ingest",
            *sorted(tmp_path.glob("?.txt")),
            "--whole",
            "--url",
            fake.url,
            "--retrievals",
            file,
            *more,
        ]
        given += ["--system-prompt", SYSTEM, "--journal", tmp_path / "journal", "--json", figures]
        result = CliRunner().invoke(app, list(map(str, given)))
        assert not result.exception or isinstance(result.exception, SystemExit)
        return result.exit_code, result.output, json.loads(figures.read_text())["files"][-1]

    return run


def sent(fake):
    """Ids of each prompt of several passages."""
    spans = (body["kv_transfer_params"]["ragkv"].get("documents", ()) for body in fake.prompts())
    return [[each["id"] for each in documents] for documents in spans if len(documents) > 1]


LOG = [["b.txt", "a.txt"], ["a.txt", "c.txt", "b.txt"], ["a.txt", "b.txt", "c.txt"], ["d.txt", "a.txt"]]


def test_likely_orders_are_prefilled_behind_the_system_prompt(fake, ingest):
    status, _, figures = ingest(LOG)
    assert status == 0 and sent(fake) == [["a.txt", "b.txt", "c.txt"]]
    (body,) = (body for body in fake.prompts() if len(body["kv_transfer_params"]["ragkv"]["documents"]) == 3)
    server = rag.Server(fake.url)
    passages = [(name, TEXTS[name]) for name in ("a.txt", "b.txt", "c.txt")]
    assert body["prompt"] == rag.prompt(server, SYSTEM, passages).token_ids
    assert figures["passages"] == figures["answered"] == 1 and figures["error"] is None
    assert rag.order(server, SYSTEM, passages[::-1]).passages == passages
    ingest(LOG)
    assert len(sent(fake)) == 1, "the journal has it"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("[1, 2]\n", "line 1"),
        ('["a.txt"]\n{}\n', "line 2"),
        ("[" * 200_000, "line 1"),
        ('["x.txt", "y.txt"]\n', "x.txt"),
    ],
)
def test_a_log_that_cannot_be_used_is_one_line_and_the_passages_are_kept(fake, ingest, log, reason):
    status, shown, figures = ingest(log)
    assert status == 1 and reason in figures["error"] and reason in shown and len(fake.prompts()) == len(TEXTS)


@pytest.mark.parametrize(("room", "chains"), [(2, [["a.txt", "b.txt"]]), (1, [])])
def test_of_chains_that_are_too_long_what_fits_is_prefilled(fake, ingest, room, chains):
    server = rag.Server(fake.url)
    fake.max_model_len = len(rag.prompt(server, SYSTEM, list(TEXTS.values())[:room]).token_ids) + 1
    status, _, figures = ingest(LOG)
    assert status == 0 and sent(fake) == chains and figures["passages"] == len(chains)


def test_ids_that_are_no_passages_here_are_left_out(fake, ingest):
    assert ingest([["x.txt", *each] for each in LOG])[0] == 0 and sent(fake) == [["a.txt", "b.txt", "c.txt"]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("most", [1, 3, 100])
def test_chains_are_the_most_used_beginnings(seed, most):
    chance = Random(seed)
    log = [chance.sample("abcdef", chance.randrange(0, 5)) for _ in range(60)]
    chains = likely_chains(log, most)
    counts = {name: sum(name in each for each in log) for name in "abcdef"}
    ordered = ["".join(sorted(each, key=lambda name: (-counts[name], name))) for each in log]
    used = [sum(each.startswith("".join(chain)) for each in ordered) for chain in chains]
    assert len(chains) <= most and all(times >= 2 for times in used) and all(len(chain) > 1 for chain in chains)
    assert not any(a != b and b[: len(a)] == a for a, b in itertools.product(chains, chains))
    first = max(
        sum(each.startswith(pair) for each in ordered) for pair in {each[:2] for each in ordered if each[1:]}
    )
    assert any(sum(each.startswith("".join(chain[:2])) for each in ordered) == first for chain in chains)


def test_long_retrievals_are_cut_to_what_can_be_ordered():
    names = [f"{number:05}" for number in range(5000)]
    assert likely_chains([names, names], 5) == [tuple(names[:LONGEST])]


def test_a_log_of_nothing_gives_no_chains(tmp_path):
    assert (
        likely_chains([], 5) == [] and likely_chains([["a", "b"]], 5) == [] and likely_chains([["a"]] * 9, 5) == []
    )
    (tmp_path / "log").write_text("")
    assert read_retrievals(tmp_path / "log") == []
    with pytest.raises(OSError, match="No such"):
        read_retrievals(tmp_path / "none")
    (tmp_path / "log").write_bytes(b"\xff\n")
    with pytest.raises(RagKVError, match="line 1"):
        read_retrievals(tmp_path / "log")
