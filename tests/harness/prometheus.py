"""Runs a Prometheus that scrapes the parts of a test, and reads the dashboard and the alerts of `deploy/monitoring`."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from harness.client import call, get_json
from harness.ports import free_port
from harness.process import Part, Process
from harness.sidecar import ROOT
from harness.waiting import until

# The folder with the programs prometheus and promtool.
PROGRAMS = Path(os.environ.get("PROMETHEUS", ROOT / "target" / "prometheus" / "usr" / "bin"))
MONITORING = ROOT / "deploy" / "monitoring"
DASHBOARD, ALERTS = MONITORING / "dashboard.json", MONITORING / "alerts.yaml"

# Each 500 ms one sample of each series. A rate needs two samples in its window.
SCRAPE_MS = 500
WINDOW = "5s"
START_BOUND_S = 30.0
BOUND_S = 60.0

needs_prometheus = pytest.mark.skipif(
    not (PROGRAMS / "prometheus").exists(),
    reason=f"no Prometheus in {PROGRAMS}: dashboard and alerts are not tested; run `make prometheus`",
)


def promtool(*arguments: str | Path) -> str:
    """Runs promtool, and fails the test if it finds a fault. Returns its output."""
    done = subprocess.run(
        [PROGRAMS / "promtool", *arguments], capture_output=True, text=True, timeout=BOUND_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def panels() -> Iterator[tuple[str, list[str]]]:
    """Yields the title and the queries of each panel of the dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        if panel["type"] != "row":
            yield panel["title"], [target["expr"] for target in panel["targets"]]


def of_engines(queries: list[str]) -> bool:
    """Returns true if a panel shows metrics of vLLM."""
    return any("vllm:" in query for query in queries)


def quick_alerts() -> str:
    """Returns the rules with times that fit into a test: no alert waits, and rates look back over some samples."""
    text = re.sub(r"^( +for:) .*$", r"\1 0s", ALERTS.read_text(), flags=re.MULTILINE)
    return re.sub(r"\[(?:5|10)m\]", f"[{WINDOW}]", text)


class Prometheus(Part):
    """One Prometheus with the alerts of `quick_alerts`."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._folder = folder / "prometheus"
        self._logs = logs

    def start(self, jobs: dict[str, list[str]]) -> None:
        """Starts to scrape the targets (URLs) of each job. Returns when Prometheus answers."""
        self._folder.mkdir()
        (self._folder / "alerts.yaml").write_text(quick_alerts())
        config = {
            "global": {"scrape_interval": f"{SCRAPE_MS}ms", "evaluation_interval": f"{SCRAPE_MS}ms"},
            "rule_files": ["alerts.yaml"],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [url.removeprefix("http://") for url in urls]}]}
                for job, urls in jobs.items()
            ],
        }
        # JSON is also YAML.
        file = self._folder / "prometheus.yaml"
        file.write_text(json.dumps(config))
        command: list[str | Path] = [
            PROGRAMS / "prometheus", f"--config.file={file}", f"--storage.tsdb.path={self._folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}", "--log.level=warn",
        ]  # fmt: skip
        self.process = Process("prometheus", command, self._logs / "prometheus.log")
        self.until(self._answers, lambda: "it does not answer", START_BOUND_S)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Returns the present samples of an expression; Grafana's variables in it get fixed values."""
        expression = expression.replace("$__rate_interval", WINDOW)
        answer = get_json(f"{self.url}/api/v1/query?{urlencode({'query': expression})}")
        assert answer["status"] == "success", answer
        samples: list[dict[str, Any]] = answer["data"]["result"]
        return samples

    def has_data(self, expression: str) -> bool:
        """Returns true if an expression gives at least one number."""
        return any(sample["value"][1] != "NaN" for sample in self.query(expression))

    def firing(self) -> set[str]:
        """Returns the names of the alerts that fire."""
        alerts = get_json(f"{self.url}/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def names(self) -> set[str]:
        """Returns the names of all metrics that Prometheus has scraped."""
        return set(get_json(f"{self.url}/api/v1/label/__name__/values")["data"])

    def until(self, condition: Callable[[], bool], what: Callable[[], str], bound_s: float = BOUND_S) -> None:
        until(what, condition, process=self.process, bound_s=bound_s)

    def _answers(self) -> bool:
        try:
            return call(f"{self.url}/-/ready", timeout_s=2.0)[0] == 200
        except OSError:
            return False
