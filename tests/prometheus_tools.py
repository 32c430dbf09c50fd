"""Prometheus and promtool as the distribution has them: one server on loopback, with a folder of its own."""

import json
import shutil
import subprocess
import time
import urllib.parse
from pathlib import Path

import pytest

from ragkv.benchmarks.server import HOST, Server, fetch, free_port
from ragkv.errors import RagKVError

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="no prometheus on PATH: apt-get install prometheus"
)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool on PATH: apt-get install prometheus"
)
POLL_SECONDS = 0.1


def promtool(*arguments, folder):
    """What promtool says in `folder`, and whether it is content."""
    done = subprocess.run(["promtool", *map(str, arguments)], cwd=folder, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def filled_in(expression: str, seconds: int = 60) -> str:
    """A dashboard's query as Grafana sends it: all servers, and a price of 1."""
    values = {"__rate_interval": f"{seconds}s", "__range": f"{seconds}s", "price": "1"}
    for name in ("model_name", "instance", "engine"):
        values[name] = ".*"
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression
    return expression


class Prometheus:
    """Runs from construction to `close` on a folder that `ragkv observe up` wrote; scrapes every second."""

    def __init__(self, folder: Path, data: Path) -> None:
        config = folder / "prometheus-test.yml"
        text = (folder / "prometheus.yml").read_text()
        every_second = text.replace("_interval: 15s", "_interval: 1s").replace("_timeout: 10s", "_timeout: 1s")
        assert every_second.count(": 1s") == 3
        config.write_text(every_second)
        port = free_port()
        command = [
            *("prometheus", f"--config.file={config}", f"--storage.tsdb.path={data}", "--log.level=warn"),
            f"--web.listen-address={HOST}:{port}",
        ]
        data.mkdir(parents=True, exist_ok=True)
        self._server = Server(command, port, data / "log", health="/-/ready")

    def wait(self) -> "Prometheus":
        """Until it answers queries."""
        try:
            self._server.wait(60)
        except BaseException:
            self._server.close()
            raise
        return self

    def close(self) -> None:
        self._server.close()

    def __enter__(self) -> "Prometheus":
        return self.wait()

    def __exit__(self, *_: object) -> None:
        self.close()

    def query(self, expression: str) -> list[dict]:
        """The samples of an expression now, each with `metric` and `value` (time, text)."""
        return self._get("query", query=expression)["result"]

    def series(self, expression: str, seconds: float, step: float = 1.0) -> list[tuple[dict, list[float]]]:
        """Labels and values of an expression over the last seconds."""
        now = time.time()
        given = {"query": expression, "start": now - seconds, "end": now, "step": step}
        found = self._get("query_range", **given)["result"]
        return [(each["metric"], [float(value) for _, value in each["values"]]) for each in found]

    def rules(self) -> list[dict]:
        """All rules, as the server has loaded them."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def wait_for(self, expression: str, seconds: float = 60) -> list[dict]:
        """Ask until an expression has samples."""
        deadline = time.monotonic() + seconds
        while not (found := self.query(expression)):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {expression}"
            time.sleep(POLL_SECONDS)
        return found

    def wait_for_scrapes(self, count: int = 3, job: str = "vllm") -> None:
        """Until every target of a job was scraped some times more."""
        target = f'up{{job="{job}"}}'
        self.wait_for(target)
        since = time.time()
        last = f"timestamp({target}) > {since:.3f}"
        for _ in range(count):
            found = self.wait_for(last)
            since = max(float(each["value"][1]) for each in found)
            last = f"timestamp({target}) > {since:.3f}"

    def _get(self, what: str, **given: object) -> dict:
        url = f"{self._server.url}/api/v1/{what}?{urllib.parse.urlencode(given)}"
        try:
            answer = json.loads(fetch(url, 30))
        except OSError as error:
            body = getattr(error, "read", lambda: b"")().decode(errors="replace")
            raise RagKVError(f"prometheus: {given.get('query', what)}: {error}: {body}") from None
        return answer["data"]
