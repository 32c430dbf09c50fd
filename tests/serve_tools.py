"""What the tests of the serving benchmark share: samples, reports, filings that are quick to cut."""

import re

from ragkv.benchmarks.serve_client import Sample
from ragkv.benchmarks.serve_report import Played, report
from ragkv.benchmarks.tenk import Filing, Question


def cut(text, tokens):
    """The first words of a text, as they stand."""
    words = list(re.finditer(r"\S+", text))
    return text if len(words) <= tokens else text[: words[tokens - 1].end()]


def filing(number, words=400, questions=8):
    """A filing that no other looks like, in paragraphs of twenty words."""
    said = [f"f{number}w{n}" for n in range(words)]
    text = "\n\n".join(" ".join(said[at : at + 20]) for at in range(0, words, 20))
    return Filing(
        f"F{number}", text, tuple(Question(f"{number}: what of {n}?", f"It is {n}.") for n in range(questions))
    )


def sample(
    round=0, session=0, turn=1, kind=None, ttft=1.0, tokens=5, tpot=0.1, prompt=100, error=None, started=0.0
):
    """A request that went well, unless there is an error."""
    kind = kind or ("open" if turn == 1 else "follow-up")
    if error is not None:
        return Sample(round, session, turn, kind, None, None, None, None, 0, error, started)
    latency = ttft + tpot * (tokens - 1)
    return Sample(round, session, turn, kind, ttft, tpot, latency, prompt, tokens, None, started)


def played(system="ragkv", samples=(), hits=None, prompt_tokens=1000, wall=10.0, memory=None):
    return Played(system, list(samples), wall, {"host": 500} if hits is None else hits, prompt_tokens, memory)


def as_report(*systems, **more):
    """A report, with a workload that is the same everywhere unless `config` says otherwise."""
    config = {"filings": 4, "turns": 5, "seed": 0} | more.pop("config", {})
    return report(more.pop("environment", {"vllm": "0"}), config, list(systems), **more)
