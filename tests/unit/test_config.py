"""Settings: where they come from, which source is stronger, and what is said of those that cannot be."""

import dataclasses

import pytest
from pydantic import ValidationError

from config_tools import ADMISSION_KEYS, EXTRA, GIB, PINNED, POLICY_KEYS, SECTIONS, SIZE_KEYS, fault
from ragkv.config import Loaded, Settings, check_shared_memory, load
from ragkv.config.settings import keys
from ragkv.errors import ConfigError, RagKVError

# For every key a value that is not its default: as a variable gives it, and what it means.
OTHERS = {
    "memory.capacity": ("1GiB", GIB),
    "memory.page_tokens": ("17", 17),
    "memory.priorities": ("3", 3),
    "device.capacity": ("3 MB", 3_000_000),
    "device.after": ("1", 1),
    "disk.path": ("~/kv", "~/kv"),
    "disk.capacity": ("2TiB", 2048 * GIB),
    "disk.write": ("back", "back"),
    "disk.fsync": ("true", True),
    "disk.shared": ("1", True),
    "redis.url": ("redis://127.0.0.1", "redis://127.0.0.1"),
    "redis.prefix": ("team", "team"),
    "redis.ttl": ("86400", 86400),
    "redis.timeout": ("0.25", 0.25),
    "redis.max_value": ("1MiB", 2**20),
    "redis.write": ("back", "back"),
    "store.name": ("s3", "s3"),
    "store.options": ('{"bucket": "kv"}', {"bucket": "kv"}),
    "store.capacity": ("2TiB", 2048 * GIB),
    "store.write": ("back", "back"),
    "placement.deadline": ("0", 0.0),
    "placement.queue": ("1GiB", GIB),
    "placement.gate": ("false", False),
    "placement.flush": ("7.5", 7.5),
    "chunks.min_tokens": ("64", 64),
    "chunks.average_tokens": ("100", 100),
    "chunks.max_tokens": ("300", 300),
    "transfer.staging": ("1MiB", 2**20),
    "transfer.step": ("7MiB", 7 * 2**20),
    "fusion.enabled": ("true", True),
    "fusion.selection": ("deviation", "deviation"),
    "fusion.recompute_ratio": ("0.5", 0.5),
    "fusion.min_tokens": ("100", 100),
    "fusion.keep": ("1", True),
    "fusion.documents": ("0", 0),
    "hints.allow": ("pin, documents", "documents, pin"),
    "trace.file": ("/tmp/trace", "/tmp/trace"),
    "control.listen": ("8900", "8900"),
    "control.token_file": ("/etc/token", "/etc/token"),
}
OTHERS |= dict.fromkeys(POLICY_KEYS, ("lfu", "lfu")) | dict.fromkeys(ADMISSION_KEYS, ("cost", "cost"))


@pytest.fixture
def write(tmp_path):
    def write(text, name="ragkv.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def values(loaded):
    return {key: getattr(getattr(loaded.settings, key.split(".")[0]), key.split(".")[1]) for key in keys()}


def test_all_keys_and_defaults_are_pinned():
    loaded = load({}, {})
    assert values(loaded) == PINNED
    assert list(keys()) == list(PINNED)
    assert loaded.origins == {}
    assert all(field.description for field in keys().values())
    assert loaded.settings == Settings()


def test_every_source_and_its_strength(write):
    path = write(
        "memory: {capacity: 1GiB, page_tokens: 8, policy: lfu}\n"
        "chunks: {min_tokens: 20, average_tokens: 64}\n"
        "transfer: {staging: 2MiB}\n"
    )
    loaded = load(
        {"config": str(path), "memory": {"capacity": "2GiB", "page_tokens": 32}, "chunks": {"max_tokens": 512}},
        {"RAGKV_MEMORY_CAPACITY": "3 GiB", "RAGKV_CHUNKS_MIN_TOKENS": "24", "PATH": "/bin"},
    )
    assert values(loaded) == PINNED | {
        "memory.capacity": 3 * GIB,
        "memory.page_tokens": 32,
        "memory.policy": "lfu",
        "chunks.min_tokens": 24,
        "chunks.average_tokens": 64,
        "chunks.max_tokens": 512,
        "transfer.staging": 2 * 2**20,
    }
    assert loaded.origins == {
        "memory.capacity": "RAGKV_MEMORY_CAPACITY",
        "memory.page_tokens": EXTRA,
        "memory.policy": str(path),
        "chunks.min_tokens": "RAGKV_CHUNKS_MIN_TOKENS",
        "chunks.average_tokens": str(path),
        "chunks.max_tokens": EXTRA,
        "transfer.staging": str(path),
    }


def test_every_key_has_another_value_here():
    assert PINNED.keys() == OTHERS.keys()
    assert all(value != PINNED[key] for key, (_, value) in OTHERS.items())


@pytest.mark.parametrize("key", OTHERS)
def test_every_key_can_be_set_from_everywhere(key, write):
    text, value = OTHERS[key]
    section, name = key.split(".")
    variable = f"RAGKV_{section}_{name}".upper()
    path = write(f"{section}: {{{name}: {text!r}}}")
    for loaded, origin in (
        (load({}, {variable: text}), variable),
        (load({section: {name: text}}, {}), EXTRA),
        (load({section: {name: value}}, {}), EXTRA),
        (load({}, {}, path), str(path)),
    ):
        found = values(loaded)[key]
        assert (found, type(found)) == (value, type(value))
        assert values(loaded) == PINNED | {key: value}
        assert loaded.origins == {key: origin}


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("RAGKV_MEMORY_PAGE_TOKENS", "4")
    assert load().settings.memory.page_tokens == 4
    assert load({}, {}).settings.memory.page_tokens == 16


def test_which_file_is_read(write):
    named, variable, given_file = (
        write(f"memory: {{page_tokens: {number}}}", f"{number}.yaml") for number in (1, 2, 3)
    )
    extra, environ = {"config": str(named)}, {"RAGKV_CONFIG": str(variable)}
    assert load(extra, {}).settings.memory.page_tokens == 1
    assert load({"config": named}, {}).settings.memory.page_tokens == 1
    assert load(extra, environ).settings.memory.page_tokens == 2
    assert load(extra, environ, given_file).settings.memory.page_tokens == 3
    assert load(extra, environ, given_file).origins == {"memory.page_tokens": str(given_file)}
    assert extra == {"config": str(named)}, "the caller's mapping stays as it is"


def test_an_empty_file_says_nothing(write):
    assert load({}, {}, write("# nothing yet\n")) == load({}, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory: [", "is not YAML"),
        (b"memory: \xff\xfe", "is not YAML"),
        ("memory: {page_tokens: 2024-13-45}", "is not YAML"),
        ("memory: !!python/object:os.system {}", "is not YAML"),
        ("memory: {capacity: 1GiB}\nmemory: {policy: lru}", "memory: given twice"),
        ("memory: {policy: lfu, capacity: 1GiB, policy: lru}", "policy: given twice"),
        ("- memory", f"allowed: sections {', '.join(SECTIONS)}"),
        ("just words", f"allowed: sections {', '.join(SECTIONS)}"),
        ("1: {capacity: 2}", f"allowed: sections {', '.join(SECTIONS)}"),
    ],
)
def test_a_foreign_file_is_named(write, text, said):
    path = write(text)
    message = fault(file=path)
    assert f"configuration file {path}" in message and said in message


def test_an_unreadable_file_is_named(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert fault(file=missing) == f"ragkv: configuration file {missing}: No such file or directory"
    assert fault({"config": str(missing)}) == fault(environ={"RAGKV_CONFIG": str(missing)})
    assert fault(file=tmp_path) == f"ragkv: configuration file {tmp_path}: Is a directory"
    assert fault({"config": 5}) == "ragkv: config = 5; allowed: the path of a YAML file"


def test_unknown_keys_are_refused_at_both_levels(write):
    message = fault({"memroy": {"capacity": 1}, "chunks": {"size": 256}})
    assert f"; memroy (from {EXTRA}): unknown key; did you mean memory? allowed: " in message
    assert f"chunks.size = 256 (from {EXTRA}): unknown key; allowed: chunks.min_tokens, chunks.av" in message
    path = write("memory: {Capacity: 1GiB}")
    meant = "unknown key; did you mean memory.capacity? allowed: memory.capacity, memory.page_tokens"
    assert f"memory.Capacity = '1GiB' (from {path}): {meant}" in fault(file=path)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("memory: {capcity: 1GiB}", "memory.capacity"),
        ("memory.capcity: 1GiB", "memory.capacity"),
        ("dsk.path: /x", "disk.path"),
        ("rediss: {url: 'redis://h'}", "redis"),
        ("deadline: 1", "placement.deadline"),
        ("capacity: 1GiB", "memory.capacity or device.capacity or disk.capacity or store.capacity"),
    ],
)
def test_what_was_meant_is_guessed(write, text, meant):
    assert f"unknown key; did you mean {meant}? allowed: " in fault(file=write(text))


def test_what_was_meant_by_a_variable_is_guessed():
    message = fault(environ={"RAGKV_DISK_PAHT": "/x", "RAGKV_XYZZY": "1"})
    assert "RAGKV_DISK_PAHT = '/x' names no setting; did you mean RAGKV_DISK_PATH? allowed: " in message
    assert "RAGKV_XYZZY = '1' names no setting; allowed: " in message


def test_keys_may_be_dotted(write):
    path = write("disk.path: /kv\nmemory: {policy: lfu}\nmemory.capacity: 1GiB\n")
    loaded = load({"disk.capacity": "2GiB"}, {}, path)
    found = loaded.settings
    assert (found.disk.path, found.disk.capacity, found.memory.capacity) == ("/kv", 2 * GIB, GIB)
    assert found.memory.policy == "lfu"
    assert loaded.origins["disk.path"] == str(path) and loaded.origins["disk.capacity"] == EXTRA


@pytest.mark.parametrize("text", ["disk.path: /a\ndisk: {path: /b}", "disk: {path: /a}\ndisk.path: /a"])
def test_a_key_in_both_ways_is_refused(write, text):
    path = write(text)
    assert f"disk.path (from {path}): given twice; allowed: either disk.path or path under disk" in fault(
        file=path
    )


def test_a_dotted_key_beside_no_mapping_is_refused(write):
    assert "disk = 5 (from" in fault(file=write("disk: 5\ndisk.path: /a"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("memory.capacity", "64KiB", "at least 1MiB"), ("redis.max_value", "4GiB", "at most 512MiB")],
)
def test_bounds_of_sizes_read_as_people_write_them(key, value, words):
    assert f"{key} = {value} (from {EXTRA}): allowed: {words}" in fault({key: value})


def test_unknown_variables_are_refused():
    message = fault(environ={"RAGKV_MEMORY_SIZE": "1", "RAGKV_": "2", "RAGKVX": "not ours"})
    assert "RAGKV_MEMORY_SIZE = '1' names no setting" in message and "RAGKV_ = '2'" in message
    assert "RAGKV_CONFIG, RAGKV_MEMORY_CAPACITY" in message and "RAGKVX" not in message


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [5, None, "4GiB", ["capacity"]])
def test_a_section_is_a_mapping(section, value, write):
    said = f"allowed: a mapping with {', '.join(key for key in PINNED if key.startswith(f'{section}.'))}"
    assert fault({section: value}) == f"ragkv: {section} = {value!r} (from {EXTRA}): {said}"
    path = write(f"{section}: 5")
    name = next(key for key in PINNED if key.startswith(f"{section}.")).split(".")[1]
    assert said in fault({section: {name: 1}}, file=path), "a stronger source must not hide it"


@pytest.mark.parametrize("extra", [{1: 2}, {1: {2: 3}}, {"memory": {1: 2}}])
def test_a_key_is_a_text(extra):
    assert "allowed: " in fault(extra)


@pytest.mark.parametrize("chunks", [(128, 128, 256), (200, 128, 256), (32, 257, 256), (32, 128, 127)])
def test_chunk_sizes_ascend(chunks):
    extra = dict(zip(("min_tokens", "average_tokens", "max_tokens"), chunks, strict=True))
    message = fault({"chunks": extra})
    assert "/".join(map(str, chunks)) in message and "allowed: min_tokens < average_tokens <= max" in message


def test_chunk_sizes_are_compared_across_sources(write):
    path = write("chunks: {min_tokens: 100}")
    message = fault({}, {"RAGKV_CHUNKS_AVERAGE_TOKENS": "64"}, path)
    assert f"(from {path}, RAGKV_CHUNKS_AVERAGE_TOKENS): 100/64/256" in message


def test_a_page_is_no_larger_than_a_chunk():
    assert load({"memory": {"page_tokens": 256}}, {}).settings.memory.page_tokens == 256
    message = fault({"memory": {"page_tokens": 257}})
    assert "memory.page_tokens = 257; allowed: at most chunks.max_tokens = 256" in message


def test_one_error_names_all_faults(write):
    path = write("memory: {capacity: much}\ncolour: blue")
    message = fault({"chunks": {"min_tokens": True}}, {"RAGKV_TRANSFER_STAGING": "x", "RAGKV_NONSENSE": "1"}, path)
    for part in (
        f"memory.capacity = 'much' (from {path})",
        f"colour = 'blue' (from {path})",
        f"chunks.min_tokens = True (from {EXTRA})",
        "transfer.staging = 'x' (from RAGKV_TRANSFER_STAGING)",
        "RAGKV_NONSENSE = '1'",
    ):
        assert part in message


def test_what_was_faulty_but_overruled_is_no_fault(write):
    path = write("memory: {capacity: much}")
    assert load({"memory": {"capacity": "1GiB"}}, {}, path).settings.memory.capacity == GIB


def test_config_error_is_a_value_error_of_ours():
    assert issubclass(ConfigError, RagKVError) and issubclass(ConfigError, ValueError)


def test_settings_are_frozen():
    loaded = load({}, {})
    with pytest.raises(ValidationError, match="frozen"):
        loaded.settings.memory.capacity = 1
    with pytest.raises(ValidationError, match="frozen"):
        loaded.settings.memory = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.settings = None


def test_rows_show_every_setting_with_its_origin():
    loaded = load({"memory": {"capacity": "1.5GiB"}}, {"RAGKV_MEMORY_POLICY": "lfu"})
    assert isinstance(loaded, Loaded)
    rows = loaded.rows()
    assert [key for key, _, _ in rows] == list(PINNED)
    assert rows[:4] == [
        ("memory.capacity", "1536MiB", EXTRA),
        ("memory.page_tokens", "16", "default"),
        ("memory.policy", "lfu", "RAGKV_MEMORY_POLICY"),
        ("memory.admission", "always", "default"),
    ]
    shown = {key: text for key, text, _ in rows}
    assert {key: shown[key] for key in SIZE_KEYS[1:-2]} == {
        "device.capacity": "0B",
        "disk.capacity": "64GiB",
        "redis.max_value": "64MiB",
        "store.capacity": "64GiB",
        "placement.queue": "256MiB",
    }
    assert (shown["disk.path"], shown["disk.fsync"], shown["redis.timeout"]) == ("None", "False", "1.0")


def test_shared_memory_must_have_room():
    made = load({}, {}).settings
    check_shared_memory(made, 4 * GIB)
    with pytest.raises(ConfigError, match=r"memory.capacity = 4GiB: allowed: at most .* 3\.9GiB"):
        check_shared_memory(made, 4 * GIB - 1024)
