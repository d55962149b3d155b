"""Checks the panels of the dashboard that show metrics of vLLM, with real engines.

tests/deploy/test_monitoring.py checks the other panels.
"""

from __future__ import annotations

from pathlib import Path

from harness.client import complete
from harness.pair import Pair
from harness.prometheus import Prometheus, needs_prometheus, of_engines, panels
from harness.prompts import prompt
from harness.reference import Reference

# These counters exist only after their first event.
AFTER_A_FAILURE = ("load_failures", "save_failures")


@needs_prometheus
def test_the_panels_of_engines_show_data(pair: Pair, reference: Reference, logs: Path, tmp_path: Path) -> None:
    prometheus = Prometheus(tmp_path, logs)
    try:
        prometheus.start({"engines": [pair.prefill.url, pair.decode.url]})
        queries = [query for _, all_of in panels() if of_engines(all_of) for query in all_of]
        wanted = [query for query in queries if not any(name in query for name in AFTER_A_FAILURE)]
        assert len(wanted) >= 6
        tokens = prompt(600, seed=9100)
        pair.move(tokens).check(reference.token_ids(tokens), 600)
        # The connector skips this request, because it has no transfer parameters.
        complete(pair.prefill.url, tokens, max_tokens=1)

        def empty() -> list[str]:
            return [query for query in wanted if not prometheus.has_data(query)]

        prometheus.until(lambda: not empty(), lambda: f"queries without data: {empty()}")
    finally:
        prometheus.stop()
