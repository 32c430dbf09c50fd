"""The memory that backs shared memory: control groups of both versions, in a folder made for it."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from ragkv import preflight
from ragkv.config import load
from ragkv.errors import ConfigError
from ragkv.kvstore.backing import MOST_RESERVE, Backing, backing

MIB, GIB = 1 << 20, 1 << 30
NO_LIMIT_IN_1 = "9223372036854771712"


class Machine:
    """A /proc and a /sys/fs/cgroup of that much memory."""

    def __init__(self, folder, available=64 * GIB, swap=0):
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.write(
            self.proc / "meminfo",
            f"MemTotal: 1 kB\nMemAvailable:  {available >> 10} kB\nSwapFree: {swap >> 10} kB\n",
        )
        self.mounts = []

    def write(self, path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def inside(self, text):
        self.write(self.proc / "self" / "cgroup", text)

    def mount(self, kind, place, root="/", options="rw"):
        self.mounts.append(
            f"31 23 0:28 {root} {self.sys / place} rw,relatime shared:9 - {kind} {kind} {options}\n"
        )
        self.write(self.proc / "self" / "mountinfo", "1 0 8:1 / / rw - ext4 /dev/x rw\n" + "".join(self.mounts))

    def two(self, path, limit="max", used=0, cache=0):
        folder = self.sys / path
        self.write(folder / "memory.max", f"{limit}\n")
        self.write(folder / "memory.current", f"{used}\n")
        self.write(folder / "memory.stat", f"anon 5\ninactive_file {cache // 2}\nactive_file {cache // 2}\n")

    def one(self, path, limit=NO_LIMIT_IN_1, used=0, cache=0, hierarchy=NO_LIMIT_IN_1):
        folder = self.sys / path
        self.write(folder / "memory.limit_in_bytes", f"{limit}\n")
        self.write(folder / "memory.usage_in_bytes", f"{used}\n")
        stat = f"inactive_file 1\nhierarchical_memory_limit {hierarchy}\ntotal_inactive_file {cache}\n"
        self.write(folder / "memory.stat", stat)

    def found(self):
        """Bytes without the reserve, and the source."""
        given = backing(self.proc)
        return None if given is None else (given.bytes * 16 // 15, given.source)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def near(found, wanted, *words):
    size, source = found
    assert abs(size - wanted) < 16 and all(word in source for word in words), found


def test_the_machine_without_groups(tmp_path):
    near(Machine(tmp_path, 2 * GIB, swap=GIB).found(), 3 * GIB, "this machine")


def test_the_reserve_is_a_sixteenth_and_at_most_1_gib(tmp_path):
    assert backing(Machine(tmp_path, 64 * GIB).proc) == Backing(64 * GIB - MOST_RESERVE, "this machine's memory")


def test_a_container_of_version_2(machine):
    """With a namespace of its own it is at the root of what it sees."""
    machine.inside("0::/\n"), machine.mount("cgroup2", "cgroup")
    machine.two("cgroup", limit=4 * GIB, used=GIB, cache=512 * MIB)
    near(machine.found(), 3 * GIB + 512 * MIB, "cgroup/memory.max")


def test_no_limit(machine):
    machine.inside("0::/a/b\n"), machine.mount("cgroup2", "cgroup")
    machine.two("cgroup/a/b"), machine.two("cgroup/a")
    assert machine.found()[1] == "this machine's memory"


def test_a_parents_limit_of_version_2(machine):
    machine.inside("0::/kube/pod/box\n"), machine.mount("cgroup2", "cgroup")
    machine.two("cgroup/kube/pod/box", limit=8 * GIB, used=MIB)
    machine.two("cgroup/kube/pod", limit=2 * GIB, used=GIB)
    machine.two("cgroup/kube")
    near(machine.found(), GIB, "kube/pod/memory.max")


def test_a_container_of_version_1(machine):
    """Without a namespace: the path is the host's, and what is mounted begins there."""
    machine.inside("5:devices:/x\n4:cpu,memory:/docker/abc\n0::/\n")
    machine.mount("cgroup", "memory", root="/docker/abc", options="rw,cpu,memory")
    machine.one("memory", limit=2 * GIB, used=GIB, cache=MIB)
    near(machine.found(), GIB + MIB, "memory/memory.limit_in_bytes")


def test_parents_of_version_1_in_sight_and_out_of_it(machine):
    machine.inside("4:memory:/a/b\n"), machine.mount("cgroup", "memory", options="rw,memory")
    machine.one("memory/a/b"), machine.one("memory/a", limit=GIB, used=MIB)
    near(machine.found(), GIB - MIB, "a/memory.limit_in_bytes")
    machine.one("memory/a/b", hierarchy=512 * MIB, used=0)
    near(machine.found(), 512 * MIB, "a/b/memory.limit_in_bytes")


def test_version_1_beside_an_empty_version_2(machine):
    machine.inside("4:memory:/a\n0::/\n")
    machine.mount("cgroup2", "unified"), machine.mount("cgroup", "memory", options="rw,memory")
    (machine.sys / "unified").mkdir(parents=True)
    machine.one("memory/a", limit=GIB)
    near(machine.found(), GIB, "memory/a")


def test_a_path_of_another_namespace(machine):
    machine.inside("0::/../../elsewhere\n"), machine.mount("cgroup2", "cgroup")
    machine.two("cgroup", limit=GIB)
    near(machine.found(), GIB, "cgroup/memory.max")


def test_a_mount_with_a_space_in_its_name(machine):
    machine.inside("0::/\n")
    machine.two("c group", limit=GIB)
    machine.mount("cgroup2", r"c\040group")
    near(machine.found(), GIB)


def test_more_in_use_than_allowed(machine):
    machine.inside("0::/\n"), machine.mount("cgroup2", "cgroup")
    machine.two("cgroup", limit=GIB, used=2 * GIB)
    assert machine.found()[0] == 0


def test_a_limit_of_nothing(machine):
    machine.inside("0::/\n"), machine.mount("cgroup2", "cgroup")
    machine.two("cgroup", limit=0)
    assert machine.found()[0] == 0


def test_files_that_are_folders(machine):
    machine.inside("0::/a\n"), machine.mount("cgroup2", "cgroup")
    (machine.sys / "cgroup" / "a" / "memory.max").mkdir(parents=True)
    (machine.sys / "cgroup" / "memory.stat").mkdir()
    assert machine.found()[1] == "this machine's memory"


def test_nobody_says(tmp_path):
    assert backing(tmp_path / "nothing") is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_files_say_nothing_is_raised(tmp_path, data):
    machine = Machine(tmp_path)
    machine.inside("0::/a\n4:memory:/a\n")
    machine.mount("cgroup2", "two"), machine.mount("cgroup", "one", options="rw,memory")
    machine.two("two/a", limit=GIB), machine.one("one/a", limit=GIB)
    files = sorted(each for each in tmp_path.rglob("*") if each.is_file())
    pieces = st.sampled_from(
        ["max", "0::", "memory", ":", " - ", "/", "\\777", "9" * 40, "-1", " ", "cgroup2 x rw", "kB"]
    )
    text = st.lists(pieces | st.text(max_size=5), max_size=8).map("".join)
    for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=4)):
        file.write_bytes(_bytes(data.draw(text | st.binary(max_size=20))))
    given = backing(machine.proc)
    assert given is None or given.bytes >= 0


def _bytes(value):
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")


def test_an_engine_that_would_be_killed_does_not_start(monkeypatch):
    settings = load({"memory": {"capacity": "64MiB"}}, {}).settings
    monkeypatch.setattr(preflight, "available_bytes", lambda: GIB)
    monkeypatch.setattr(preflight, "backing", lambda: Backing(63 * MIB, "the memory limit in memory.max"))
    with pytest.raises(
        ConfigError, match=r"memory.capacity = 64MiB: allowed: at most what .*memory.max leaves, 63MiB"
    ):
        preflight.check_room(settings)
    for there in (None, Backing(64 * MIB, "")):
        monkeypatch.setattr(preflight, "backing", lambda there=there: there)
        preflight.check_room(settings)
