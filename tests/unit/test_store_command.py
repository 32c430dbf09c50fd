"""`ragkv store`: what it shows of a folder, what it finds wrong, and what it removes."""

import contextlib
import dataclasses
import io
import json
import os
import re
import time

import pytest

from ragkv import cli
from ragkv.errors import StoreError
from ragkv.kvstore.codec import Header, encode
from ragkv.kvstore.keys import mark, tail_key, window_key
from ragkv.kvstore.stores.disk import DiskStore
from ragkv.kvstore.stores.folder import QUARANTINE, Folder, value_name
from ragkv.kvstore.stores.inventory import Inventory, Totals

ONE, TWO = b"\x11" * 16, b"\x22" * 16
DAY = 86400


def key(number):
    return bytes([0xA0 + number]) * 16


def header(number, namespace=ONE, tokens=3):
    return Header(
        namespace, key(number), bytes(16), b"text" * tokens, 7, False, (2, tokens, 5), "bfloat16", 1.5e9, 2.5e9
    )


def payload(made):
    return encode(made, [b"\xee" * made.raw_bytes])


@pytest.fixture
def store(tmp_path):
    """Values 0 to 3, used 0 to 3 days ago; 3 stands in another namespace."""
    with contextlib.closing(DiskStore(tmp_path / "store")) as opened:
        for number in range(4):
            made = header(number, TWO if number == 3 else ONE, tokens=3 + number)
            opened.put(key(number), payload(made))
            used = time.time() - number * DAY - 60
            os.utime(opened.folder / value_name(key(number)), (used, used))
        yield opened


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `ragkv store …`; exit status, output and errors."""

    def run(*arguments, answer=None):
        monkeypatch.setattr("sys.argv", ["ragkv", "store", *map(str, arguments)])
        if answer is not None:
            monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def harm(store, number, at=-20):
    file = store.folder / value_name(key(number))
    value, used = bytearray(file.read_bytes()), file.stat().st_mtime
    value[at] ^= 1
    file.write_bytes(value)
    os.utime(file, (used, used))


def kept(store):
    return [number for number in range(4) if store.contains([key(number)])[0]]


def test_ls_lists_the_last_used_first(store, run):
    status, out, _ = run("ls", store.folder)
    rows = re.findall(r"(a\d)(?:a\d){7} │ (\d+) +│ (\d+)B +│ [\d-]+ [\d:]+ │ (\d{8})", out)
    assert status == 0 and [row[:2] for row in rows] == [("a0", "3"), ("a1", "4"), ("a2", "5"), ("a3", "6")]
    assert [row[3] for row in rows] == [*["1" * 8] * 3, "2" * 8]
    assert int(rows[0][2]) == (store.folder / value_name(key(0))).stat().st_size
    assert "text" not in out and "more" not in out


def test_ls_keeps_to_its_limit_and_namespace(store, run):
    _, out, _ = run("ls", store.folder, "--limit", 2)
    assert "a1a1" in out and "a2a2" not in out and "There are more; --limit 0 shows all." in out
    _, out, _ = run("ls", store.folder, "--limit", 4)
    assert "There are more" not in out
    _, out, _ = run("ls", store.folder, "--namespace", "22", "--limit", 0)
    assert "a3a3" in out and "a0a0" not in out


def test_ls_shows_what_is_wrong_with_a_header(store, run):
    harm(store, 1, at=3)
    (store.folder / value_name(key(2))).write_bytes(b"")
    _, out, _ = run("ls", store.folder)
    assert re.search(r"a1a1 │ bad: magic", out) and re.search(r"a2a2 │ bad: truncated", out)


def test_show_gives_the_fields_and_no_text(store, run):
    status, out, _ = run("show", store.folder, "a1")
    assert status == 0
    fields = {"key": key(1).hex(), "namespace": ONE.hex(), "tokens": "4 ", "position": "7 "}
    for field, value in (fields | {"shape": "2 x 4 x 5", "dtype": "bfloat16", "open": "no"}).items():
        assert re.search(rf"│ {field} +│ {value}", out)
    assert "text" not in out and b"text".hex() not in out


@pytest.mark.parametrize(
    "text, complaint",
    [("a", "4 values in"), ("", "allowed: up to 32"), ("b", "no values in"), ("xyz", "allowed: up to 32")],
)
def test_show_wants_a_key_that_is_one(store, run, text, complaint):
    status, out, err = run("show", store.folder, text)
    assert status == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"KEY = {text!r}; ") and complaint in err


def test_verify_passes_what_is_good(store, run):
    status, out, _ = run("verify", store.folder)
    assert status == 0 and re.fullmatch(r"4 values, [\d.]+(B|KiB): 0 bad\n", out)


def test_an_open_tail_lies_where_its_parent_says(store, run):
    tail = dataclasses.replace(header(0), open=True)
    store.put(tail_key(tail.parent), payload(tail))
    assert run("verify", store.folder)[0] == 0
    store.put(tail.key, payload(tail))
    assert f"{tail.key.hex()}: key\n" in run("verify", store.folder)[1]


def test_verify_finds_and_moves_what_is_bad(store, run):
    harm(store, 0)
    (store.folder / value_name(key(1))).write_bytes(b"".join(payload(header(2))))
    status, out, _ = run("verify", store.folder)
    assert status == 1
    assert f"{key(0).hex()}: checksum\n" in out and f"{key(1).hex()}: key\n" in out and ": 2 bad\n" in out
    assert kept(store) == [0, 1, 2, 3]
    status, out, _ = run("verify", store.folder, "--quarantine")
    assert status == 1 and ": 2 bad, moved into quarantine\n" in out
    assert kept(store) == [2, 3] and len(list((store.folder / QUARANTINE).iterdir())) == 2
    assert run("verify", store.folder)[0] == 0
    assert run("rm", store.folder, "--all", "--yes")[:2] == (0, "4 values removed\n"), "those in quarantine too"
    assert kept(store) == [] and not list((store.folder / QUARANTINE).iterdir())


@pytest.mark.parametrize(
    "arguments, left",
    [
        (["a0", "a2"], [1, 3]),
        (["a0", "a0a0"], [1, 2, 3]),
        (["--all"], []),
        (["--namespace", "1111"], [3]),
        (["--older-than", "36h"], [0, 1]),
        (["--older-than", "1.5d", "--namespace", "22"], [0, 1, 2]),
        (["--older-than", "30d"], [0, 1, 2, 3]),
    ],
)
def test_rm_removes_what_is_asked_for(store, run, arguments, left):
    status, out, _ = run("rm", store.folder, *arguments, "--yes")
    assert status == 0 and out == f"{4 - len(left)} values removed\n"
    assert kept(store) == left


def test_rm_asks_first(store, run):
    for answer in ("n\n", ""):
        status, out, _ = run("rm", store.folder, "--all", answer=answer)
        assert status == 1 and re.search(r"Remove 4 values, [\d.]+KiB, from", out)
        assert kept(store) == [0, 1, 2, 3]
    status, out, _ = run("rm", store.folder, "--all", answer="y\n")
    assert status == 0 and "4 values removed" in out and kept(store) == []


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "give either KEYs, or --all, or"),
        (["--all", "a0"], "give either KEYs, or --all, or"),
        (["--all", "--older-than", "1d"], "give either KEYs, or --all, or"),
        (["--older-than", "week"], "--older-than = 'week'; allowed: a number with s, m, h or d"),
        (["--namespace", "*"], "--namespace = '*'; allowed: up to 32 hexadecimal digits"),
    ],
)
def test_rm_wants_to_know_what(store, run, arguments, complaint):
    status, out, err = run("rm", store.folder, *arguments, "--yes")
    assert status == 1 and out == "" and err.count("\n") == 1 and complaint in err
    assert kept(store) == [0, 1, 2, 3]


def test_stats_sum_up(store, run):
    harm(store, 2, at=3)
    store.put(key(8), [b"bad"])
    store.reject(key(8), "checksum")
    _, descriptor = Folder(store.folder, None).create(key(9))
    totals = Inventory(store.folder).totals()
    os.close(descriptor)
    files = [store.folder / value_name(key(number)) for number in range(4)]
    size, oldest, newest = sum(file.stat().st_size for file in files), files[3].stat(), files[0].stat()
    counts = {"files": 4, "bytes": size, "tokens": 3 + 4 + 6, "namespaces": 2, "bad": 1}
    times = {"oldest": oldest.st_mtime, "newest": newest.st_mtime}
    assert totals == Totals(**counts, **times, quarantined=1, temporary=1)
    _, out, _ = run("stats", store.folder)
    assert re.search(r"│ files +│ 4 ", out) and re.search(r"│ quarantined +│ 1 ", out)


def test_what_layers_with_windows_have_is_told_apart(store, run):
    """It counts no tokens."""
    where = window_key(key(1), 1)
    window = dataclasses.replace(header(9), key=where, parent=key(1), tokens=mark(1), shape=(40, 5))
    store.put(where, payload(window))
    totals = Inventory(store.folder).totals()
    assert totals.tokens == 3 + 4 + 5 + 6 and totals.bad == 0
    assert totals.window_bytes == sum(map(len, payload(window)))
    _, out, _ = run("ls", store.folder)
    assert out.count("window of 40") == 1
    assert run("verify", store.folder)[0] == 0


def test_an_empty_folder(tmp_path, run):
    assert run("verify", tmp_path)[:2] == (0, "0 values, 0B: 0 bad\n")
    assert run("rm", tmp_path, "--all")[:2] == (0, "0 values removed\n")
    status, out, _ = run("stats", tmp_path)
    assert status == 0 and re.search(r"│ newest +│ - ", out)


@pytest.mark.parametrize("command", ["ls", "verify", "stats", "show", "rm"])
@pytest.mark.parametrize("name, complaint", [("missing", "No such file"), ("file", "Not a directory")])
def test_what_is_no_folder_is_one_line(tmp_path, run, command, name, complaint):
    (tmp_path / "file").write_bytes(b"")
    status, out, err = run(command, tmp_path / name, *(["a0"] if command in ("show", "rm") else []))
    assert status == 1 and out == "" and err.count("\n") == 1
    assert err.startswith(f"{tmp_path / name}: {complaint}")


def test_listing_reads_no_more_than_the_header(store, monkeypatch):
    big = dataclasses.replace(header(0, tokens=2000), shape=(1 << 20,), dtype="uint8")
    store.put(key(0), payload(big))
    read, real = [], os.read

    def spy(descriptor, size):
        read.append(size)
        return real(descriptor, size)

    monkeypatch.setattr(os, "read", spy)
    assert Inventory(store.folder).value(key(0)).header == big
    assert sum(read) < 10_000


def test_a_value_that_goes_meanwhile_is_passed_over(store):
    values = Inventory(store.folder).values()
    assert next(values).key == key(0)
    store.delete([key(1)])
    assert [value.key for value in values] == [key(2), key(3)]
    assert Inventory(store.folder).value(key(1)) is None


def test_a_folder_that_cannot_be_written_to(store, monkeypatch):
    inventory = Inventory(store.folder)

    def refuse(*arguments, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StoreError, match=f"{store.folder}: Permission denied"):
        inventory.remove(key(0))


def test_json_for_programs(store, run):
    _, out, _ = run("ls", store.folder, "--json", "--limit", "2")
    listed = json.loads(out)
    assert [each["key"] for each in listed] == [key(0).hex(), key(1).hex()]
    assert listed[0]["tokens"] == 3 and listed[0]["namespace"] == ONE.hex() and listed[0]["fault"] is None
    _, out, _ = run("show", store.folder, "a3", "--json")
    assert json.loads(out) == {**json.loads(out), "shape": [2, 6, 5], "expires": 2.5e9, "kv_bytes": 120}
    assert "text" not in out
    harm(store, 1)
    status, out, _ = run("verify", store.folder, "--json")
    report = json.loads(out)
    assert status == 1 and list(report["bad"]) == [key(1).hex()] and report["values"] == 4 and not report["moved"]
    _, out, _ = run("stats", store.folder, "--json")
    assert json.loads(out)["files"] == 4


def test_a_tail_is_shown_under_the_key_that_was_asked_for(store, run):
    made = dataclasses.replace(header(4), open=True)
    where = tail_key(made.parent)
    store.put(where, payload(made))
    status, out, _ = run("show", store.folder, where.hex()[:16])
    assert status == 0 and where.hex() in out and made.key.hex() not in out
    assert where.hex()[:16] in run("ls", store.folder)[1]


@pytest.mark.parametrize("words", [("ls",), ("stats",), ("verify",), ("show", "3f"), ("rm", "--all", "--yes")])
def test_a_folder_of_others_is_refused(tmp_path, run, words):
    (tmp_path / "thesis.tex").write_text("mine")
    command, *more = words
    status, _, errors = run(command, tmp_path, *more)
    assert status == 1 and "no folder of ragkv's: it holds 'thesis.tex'" in errors
    assert (tmp_path / "thesis.tex").exists()


def test_an_empty_folder_and_one_with_others_files_too_are_ours(tmp_path, store, run):
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    assert run("ls", tmp_path / "empty")[0] == 0
    (store.folder / "README").write_text("whose folder this is")
    assert run("stats", store.folder)[0] == 0
