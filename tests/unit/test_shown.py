"""What others wrote is read within bounds, and shown without control characters."""

import json

import pytest
from typer.testing import CliRunner

from config_tools import fault
from fake_vllm import serving
from ragkv import cli, fetch, rag, scrape
from ragkv.checks import Finding
from ragkv.cli import config, control
from ragkv.cli.lmcache import read as read_lmcache
from ragkv.cli.serve import prepare
from ragkv.config import load
from ragkv.config.yaml_files import MOST_BYTES, read_yaml
from ragkv.errors import RagKVError
from ragkv.ingest import Journal, read_text
from ragkv.shown import printable

ESCAPE = "\x1b]0;mine\x07\x1b[31m"
LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{after}: &{after} {{<<: [*{before}, *{before}, *{before}]}}\n"
    for before, after in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
)
HOSTILE = {
    "aliases": LAUGHS,
    "merges": MERGES,
    "of itself": "a: &a [*a]",
    "many": "a: [" + "1," * 20_000 + "]",
    "deep": "a: " + "[" * 20_000,
    "large": "# " + "x" * MOST_BYTES,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_one_short_error(text, tmp_path):
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    message = fault(file=path)
    assert message.startswith(f"ragkv: configuration file {path} is not YAML: ") and len(message) < 400
    with pytest.raises(RagKVError, match="is not YAML"):
        read_lmcache(path)
    options = prepare("model", [], None, {}).command
    assert prepare("model", [f"--config={path}"], None, {}).command == (*options, f"--config={path}")


def test_aliases_within_bounds_are_read(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text("memory: &policy {policy: lfu}\ndisk: {<<: *policy, path: /kv}\n")
    assert load({}, {}, path).settings.disk.policy == "lfu"
    path.write_text("")
    assert read_yaml(path) is None


def test_very_many_faults_are_a_short_error(tmp_path):
    path = tmp_path / "many.yaml"
    path.write_text("memory:\n" + "".join(f"  key{number}: {'x' * 40}\n" for number in range(900)))
    message = fault(file=path)
    assert "memory.key0 = " in message and "and 880 more" in message and len(message) < 20_000


@pytest.mark.parametrize("value", ["x" * 10_000, [[1] * 500] * 500, 10**5000], ids=["text", "lists", "number"])
def test_a_huge_value_is_shown_in_short(value):
    assert len(fault({"memory": {"capacity": value}})) < 600


@pytest.mark.parametrize(
    "extra", [{f"disk{ESCAPE}": {"path": "/"}}, {"disk": {f"path{ESCAPE}": 1}}, {"disk": {"path": ESCAPE}}]
)
def test_errors_of_settings_are_printable(extra):
    assert fault(extra).isprintable()


def test_settings_are_shown_printable():
    assert all(each.isprintable() for row in load({"disk": {"path": f"/{ESCAPE}"}}, {}).rows() for each in row)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢 text", "plain ä 漢 text"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\x9bb\u202ec", "a\\x9bb\\u202ec"),
        ("\udcff", "\\udcff"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("", ""),
    ],
)
def test_what_is_printable(text, shown):
    assert printable(text) == shown
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"


def test_the_last_word_of_a_command_is_printable(monkeypatch, capsys):
    def fail():
        raise RagKVError(f"no {ESCAPE} such\nkey")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert "\x1b]0" not in shown and "\x07" not in shown and "no \\x1b]0;mine\\x07" in shown


def test_keys_that_are_not_taken_over_are_printable(tmp_path):
    path = tmp_path / "lmcache.yaml"
    path.write_text(json.dumps({"chunk_size": 256, f"odd{ESCAPE}": ESCAPE}))
    result = CliRunner().invoke(cli.app, ["config", "import", str(path)])
    assert result.exit_code == 0 and "not taken over: " in result.output and "odd" in result.output
    assert "\x1b" not in result.output and "\x07" not in result.output


def test_labels_of_metrics_are_printable():
    page = f'# TYPE hits counter\nhits_total{{document="{ESCAPE}",name="ok"}} 3\n'
    found = scrape.parse(page, 0.0).by("hits_total", "document")
    assert found == {printable(ESCAPE): 3.0}


def test_a_servers_answer_is_bounded(monkeypatch):
    monkeypatch.setattr(fetch, "MOST_BYTES", 1000)
    with serving() as fake:
        server = rag.Server(fake.url)
        fake.answers["/v1/models"] = lambda body: (200, {"data": [{"id": "m" * 5000}]})
        with pytest.raises(RagKVError, match="the answer has more than 1000 bytes"):
            server.models()
        fake.answers["/tokenize"] = lambda body: (500, {"error": {"message": "m" * 5000}})
        with pytest.raises(RagKVError, match="500: ") as caught:
            server.encode("text")
        assert len(str(caught.value)) < 500
        fake.answers["/metrics"] = lambda body: (200, b"# " + b"x" * 5000)
        with pytest.raises(RagKVError, match="the answer has more than 1000 bytes"):
            scrape.scrape(fake.url)


DEEP = "[" * 100_000


def test_answers_that_are_too_deep_are_no_answers():
    with serving() as fake:
        server = rag.Server(fake.url)
        fake.answers["/v1/models"] = lambda body: (200, DEEP.encode())
        with pytest.raises(RagKVError, match="the answer is no JSON object"):
            server.models()
        fake.answers["/tokenize"] = lambda body: (500, DEEP.encode())
        with pytest.raises(RagKVError, match="500: "):
            server.encode("text")
        fake.answers["/stats"] = lambda body: (200, DEEP.encode())
        with pytest.raises(RagKVError, match="/stats: "):
            control.ask(fake.url, "token", "stats")


def test_a_running_engines_figures_are_printable(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("token")
    monkeypatch.setattr(control, "ask", lambda *asked: {f"odd{ESCAPE}": ESCAPE})
    command = ["control", "stats", "--url", "http://nowhere", "--token-file", str(tmp_path / "token")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 0 and "\\x1b" in result.output and "\x1b" not in result.output


def test_what_is_checked_is_shown_printable(monkeypatch):
    found = [Finding("disk", "warn", ESCAPE, f"[/red]{ESCAPE}")]
    monkeypatch.setattr(config, "examine_settings", lambda file, environ: found)
    for options in ([], ["--json"]):
        output = CliRunner().invoke(cli.app, ["config", "check", f"a{ESCAPE}\x9b.yaml", *options]).output
        assert "mine" in output and not {"\x1b", "\x07", "\x9b"} & set(output)


def test_values_of_settings_are_no_markup(tmp_path):
    path = tmp_path / "markup.yaml"
    path.write_text(json.dumps({"disk": {"path": "/kv/[/red]"}}))
    assert "[/red]" in CliRunner().invoke(cli.app, ["config", "show", "--config", str(path)]).output


def test_a_journal_is_read_line_by_line_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.ingest.MOST_KEYS", 3)
    lines = [
        DEEP,
        '{"key": ["x"]}',
        "x" * 10_000,
        '{"key": "' + "k" * 200 + '"}',
        *(f'{{"key": "{n}"}}' for n in range(5)),
    ]
    (tmp_path / "journal").write_text("\n".join(lines))
    journal = Journal(tmp_path / "journal")
    assert [str(n) in journal for n in range(5)] == [True] * 3 + [False] * 2


def test_a_huge_text_is_one_short_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ragkv.ingest.LARGEST_TEXT", 1 << 20)
    (tmp_path / "text").write_bytes(b"x" * (1 << 20))
    assert len(read_text(tmp_path / "text")) == 1 << 20
    (tmp_path / "text").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(RagKVError, match="more than 1 MiB"):
        read_text(tmp_path / "text")
