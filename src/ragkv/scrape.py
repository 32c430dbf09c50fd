"""A server's metrics at one moment: read, asked for sums, and compared with an earlier moment."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from ragkv.errors import RagKVError
from ragkv.fetch import AnswerError, fetch
from ragkv.shown import printable

SECONDS = 5.0
Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Snapshot:
    """`values`: by name and labels, as Prometheus has them (`…_total`, `…_bucket`); `names`: of all families, also
    of those that have no values yet; `taken`: seconds, by `time.monotonic`."""

    taken: float
    names: frozenset[str]
    values: Mapping[str, Mapping[Labels, float]]

    def knows(self, family: str) -> bool:
        """Whether the server has that metric (a counter's name without `_total`)."""
        return family in self.names

    def samples(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """Labels and value of every series of that name that has these labels."""
        for key, value in self.values.get(name, {}).items():
            found = dict(key)
            if labels.items() <= found.items():
                yield found, value

    def total(self, name: str, **labels: str) -> float:
        """Sum over all series (all engines, all models); 0 where there is none."""
        return sum(value for _, value in self.samples(name, **labels))

    def most(self, name: str, **labels: str) -> float | None:
        """The largest value of the series with these labels; None where there is none."""
        return max((value for _, value in self.samples(name, **labels)), default=None)

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums by the values of one label, in order."""
        sums: dict[str, float] = {}
        for found, value in self.samples(name, **labels):
            if label in found:
                sums[found[label]] = sums.get(found[label], 0.0) + value
        return dict(sorted(sums.items()))

    def quantile(self, name: str, share: float) -> float | None:
        """Of a histogram in this snapshot, by linear interpolation inside a bucket; None without observations.

        What lies beyond the last bound counts as that bound.
        """
        bounds = sorted((float(le), count) for le, count in self.by(f"{name}_bucket", "le").items())
        if not bounds or bounds[-1][1] <= 0:
            return None
        rank = share * bounds[-1][1]
        below, before = 0.0, 0.0
        for bound, count in bounds:
            if count >= rank:
                if bound == float("inf"):
                    return below
                inside = count - before
                return below + (bound - below) * ((rank - before) / inside if inside else 1.0)
            below, before = bound, count
        return below

    def since(self, earlier: "Snapshot") -> "Snapshot":
        """The same with what came in between in place of sums: for counters and histograms, not for gauges.

        A series that fell began anew with its server: then all of it came in between.
        """
        values = {}
        for name, series in self.values.items():
            old = earlier.values.get(name, {})
            anew = any(value < old.get(key, 0.0) for key, value in series.items())
            values[name] = {key: value - (0.0 if anew else old.get(key, 0.0)) for key, value in series.items()}
        return Snapshot(self.taken - earlier.taken, self.names, values)


def parse(text: str, taken: float) -> Snapshot:
    """A snapshot from Prometheus' text format. AnswerError: the text has another format."""
    names = set()
    values: dict[str, dict[Labels, float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            names.add(family.name)
            for sample in family.samples:
                key = tuple(sorted((name, printable(value)) for name, value in sample.labels.items()))
                values.setdefault(sample.name, {})[key] = sample.value
    except (ValueError, KeyError, IndexError) as error:
        raise AnswerError(f"not metrics in Prometheus' format: {error}") from None
    return Snapshot(taken, frozenset(names), values)


def scrape(url: str) -> Snapshot:
    """The metrics that the server at `url` has under /metrics. Raises AnswerError where it gives none, and
    RagKVError where `url` is not an address."""
    address = url.rstrip("/")
    if not address.startswith(("http://", "https://")):
        raise RagKVError(f"--url = {url!r}; allowed: the address of a server, such as http://localhost:8000")
    address = address if address.endswith("/metrics") else f"{address}/metrics"
    return parse(fetch(address, timeout=SECONDS).decode("utf-8", "replace"), time.monotonic())
