"""Checks that metrics, labels, reasons, log lines and paths in the pages for users exist.

The Rust tests compare the tables of docs/reference/metrics.md and docs/proxy with the exported metrics. The tests in
this file compare the other pages with these tables.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from pd_sidecar.scheduler.eligibility import Skip
from pd_sidecar.scheduler.stats import BY_REASON, COUNTERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

PAGES = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "python" / "README.md"])
"""Every page whose links the test follows."""

TASKS = [
    DOCS / name
    for name in (
        "observability.md",
        "proxy/overview.md",
        "proxy/registration.md",
        "proxy/routing.md",
        "quickstart-one-host.md",
        "reference/reasons.md",
        "sizing.md",
        "troubleshooting.md",
    )
]
"""The pages by task. Everything that these pages name must exist."""

MONITORING = [ROOT / "deploy" / "monitoring" / name for name in ("alerts.yaml", "dashboard.json")]
"""The alerts and the dashboard, for which the same holds."""

SETTINGS = {"pd_proxy_host", "pd_proxy_port"}
"""Settings of LMCache that have the same prefix as the proxy's metrics."""

OF_PROMETHEUS = {"job", "instance", "exported_instance", "le"}
"""Labels that Prometheus or vLLM adds."""

METRIC = re.compile(r"(?:vllm:)?\bpd_(?:sidecar|proxy|store)_[a-z_]*[a-z]")
NAME = re.compile(r"`([^`\n]+)`")


@dataclass
class Metric:
    """A metric as its reference page lists it."""

    labels: set[str]
    is_histogram: bool = False


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n ").split("|")]


def reference() -> dict[str, Metric]:
    """Returns every metric, by its name in a query."""
    found: dict[str, Metric] = {}
    for line in (DOCS / "reference" / "metrics.md").read_text().splitlines():
        if line.startswith("| `pd_sidecar_"):
            name, kind, labels, *_ = cells(line)
            found[name.strip("`")] = Metric(set(NAME.findall(labels)), kind == "histogram")
    for line in (DOCS / "proxy" / "metrics.md").read_text().splitlines():
        if line.startswith("| `pd_proxy_"):
            name, labels, text = cells(line)
            found[name.strip("`")] = Metric(set(NAME.findall(labels)), "(histogram)" in text)
    for line in (DOCS / "store.md").read_text().splitlines():
        if line.startswith("| `pd_store_"):
            for name, labels in re.findall(r"`(pd_store_\w+)(?:\{([\w,]+)\})?`", cells(line)[0]):
                found[name] = Metric(set(labels.split(",")) - {""})
    of_vllm = {"model_name", "engine"}
    for name in COUNTERS:
        found[f"vllm:pd_sidecar_{name}_total"] = Metric(set(of_vllm))
    for name in BY_REASON:
        found[f"vllm:pd_sidecar_{name}_total"] = Metric(of_vllm | {"reason"})
    for name, metric in list(found.items()):
        if metric.is_histogram:
            bucket = Metric(metric.labels | {"le"})
            found |= {f"{name}_bucket": bucket, f"{name}_sum": metric, f"{name}_count": metric}
    return found


def known_values() -> set[str]:
    """Returns the values of labels: every code span of a reference page."""
    pages = [DOCS / "reference" / name for name in ("metrics.md", "reasons.md")]
    pages += [DOCS / "store.md", *(DOCS / "proxy").glob("*.md")]
    words = {word for page in pages for word in NAME.findall(page.read_text())}
    # Add the kinds of messages and the roles, because docs/proxy does not list each of them.
    return words | {"register_refused", "malformed", "shed", "prefill", "decode", "both"}


@pytest.mark.parametrize("page", [*TASKS, *MONITORING], ids=lambda page: page.name)
def test_every_metric_of_a_page_exists_with_its_labels(page: Path) -> None:
    metrics, values = reference(), known_values()
    assert len(metrics) > 60, "the tables of the reference pages are not read"
    text = page.read_text().replace("\\|", "|").replace('\\"', '"')
    for name in set(METRIC.findall(text)) - SETTINGS:
        assert name in metrics, f"{page.name}: {name} is no metric"
    for name, selector in re.findall(rf"({METRIC.pattern})\{{([^}}]*)\}}", text):
        for label, value in re.findall(r'(\w+)(?:=~|!~|!=|=)"([^"]*)"', selector):
            assert label in metrics[name].labels, f"{page.name}: {name} has no label {label}"
            for one in value.split("|"):
                assert one in values, f"{page.name}: {name} is never {label}={one}"


def test_every_query_groups_by_labels_that_exist() -> None:
    metrics = reference()
    labels = OF_PROMETHEUS.union(*(metric.labels for metric in metrics.values()))
    text = (DOCS / "observability.md").read_text()
    queries = re.findall(r"```promql\n(.*?)```", text, flags=re.DOTALL)
    assert len(queries) > 8
    assert all(METRIC.search(query) for query in queries)
    of_alerts = {"alertname"}
    for text in (*queries, *(file.read_text() for file in MONITORING)):
        groups = re.findall(r"\b(?:by|on|ignoring|group_left) \(([^)]*)\)", text)
        named = {label.strip() for group in groups for label in group.split(",")} - {""}
        assert named <= labels | of_alerts, f"{named - labels} in {text[:200]}"


def rows(heading: str) -> set[str]:
    """Returns the first cells of the tables below a heading of the page of reasons."""
    text = (DOCS / "reference" / "reasons.md").read_text()
    _, section = text.split(f"\n## {heading}\n")
    section = section.split("\n## ")[0]
    return set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE))


def test_every_reason_of_the_connector_has_a_row() -> None:
    listed = rows("Reasons of the connector")
    files = sorted((ROOT / "python" / "pd_sidecar").rglob("*.py"))
    program = "\n".join(file.read_text() for file in files)
    said = re.findall(r"_(?:fail|give_up)\(\w+, (?:[\w.]+ or )?\"(\w+)\"", program)
    said += re.findall(r"add_reason\(\"\w+_failures\", \"(\w+)\"", program)
    assert {"sidecar_lost", "layout"} <= set(said)
    assert listed == {*said, *(skip.value for skip in Skip)}


def test_every_reason_of_the_proxy_has_a_row() -> None:
    programs = (file.read_text() for file in (ROOT / "proxy" / "src").rglob("*.rs"))
    (source,) = (program for program in programs if '=> "not_expressible"' in program)
    assert rows("Reasons of the proxy") == set(re.findall(r'Self::\w+ => "(\w+)"', source))


def sources() -> str:
    """Returns the source of all programs. Strings that continue on the next line are joined."""
    files = [
        *sorted((ROOT / "common" / "src").rglob("*.rs")),
        *sorted((ROOT / "sidecar" / "src").rglob("*.rs")),
        *sorted((ROOT / "proxy" / "src").rglob("*.rs")),
        *sorted((ROOT / "python" / "pd_sidecar").rglob("*.py")),
    ]
    text = "\n".join(path.read_text() for path in files)
    text = re.sub(r"\\\n\s*", "", text)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_every_log_line_of_the_page_on_symptoms_is_one_of_the_programs() -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    listed = re.findall(r"^\s*- Log[^:]*: (.*)$", text, flags=re.MULTILINE)
    quoted = [line for found in listed for line in NAME.findall(found)]
    assert len(quoted) > 15
    programs = sources()
    for line in quoted:
        for piece in re.split(r"\.\.\.|\b[A-Z][A-Z_]*\b", line):
            words = piece.strip(" :;,()`")
            assert len(words) < 4 or words in programs, f"no program logs {words!r} of {line!r}"


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for title in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
        base = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        name, number = base, 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target} of {page.name}"
        if anchor:
            assert anchor in anchors(file), f"{target} of {page.name}"
