"""Reads the counters of pd-proxy, so that a report shows whether KV was moved."""

from __future__ import annotations

import re

SAMPLE = re.compile(
    r'^pd_proxy_(transfers|alone|moved_bytes|notices)_total(?:\{(?:reason|result)="(\w+)"\})? (\S+)$', re.M
)


def counters(metrics: str) -> dict[str, float]:
    """Returns the counters in the text of `/metrics`; empty if the server is no pd-proxy.

    `transfers` are requests with a transfer, `alone_REASON` requests without, `notices` the senders' reports on
    transfers, and `moved_bytes` the bytes in these reports.
    """
    found: dict[str, float] = {}
    for name, label, value in SAMPLE.findall(metrics):
        key = f"alone_{label}" if name == "alone" else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def added(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Returns the changes of the counters, without reasons that did not occur."""
    changes = {name: value - before.get(name, 0.0) for name, value in after.items() if name != "notices"}
    return {name: value for name, value in changes.items() if value or not name.startswith("alone_")}


def are_reported(before: dict[str, float], after: dict[str, float]) -> bool:
    """Returns true if the senders have reported on all transfers. A report comes a moment after the answer."""
    grown = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in ("transfers", "notices")}
    return grown["notices"] >= grown["transfers"]
