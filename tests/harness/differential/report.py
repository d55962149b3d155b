"""Writes the results of the differential suite as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.differential.allowed import reason
from harness.differential.case import SPLIT
from harness.differential.run import Outcome
from harness.metrics import PromptTokens

# Cases of these beginnings concern the form of a request, and not one endpoint.
FORMS = ("body: ", "content type ")


def table(outcomes: Sequence[Outcome], tokens: PromptTokens) -> str:
    """Returns one row for each kind of request, and the sums. `tokens` are the decode engine's counts of the requests
    whose KV must move.
    """
    rows: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        found = outcome.differences()
        unexplained = any(reason(outcome.case, difference) is None for difference in found)
        moved = (outcome.record or {}).get("moved") or {}
        row = Counter(
            {
                "requests": 1,
                "streamed": int(outcome.case.name.endswith("(stream)")),
                "answered with 2xx": int(200 <= outcome.plain.status < 300),
                "handed over": int(moved.get("bytes", 0) > 0),
                "bytes": moved.get("bytes", 0),
                "different": int(unexplained),
            }
        )
        for kind in (_kind(outcome), "all"):
            rows[kind] = rows.get(kind, Counter()) + row
    names = ("requests", "streamed", "answered with 2xx", "handed over", "different")
    kinds = sorted(rows, key=lambda kind: (kind == "all", kind))
    lines = [f"| requests for | {' | '.join(names)} | MB moved |", "|---" * (len(names) + 2) + "|"]
    for kind in kinds:
        cells = " | ".join(str(rows[kind][name]) for name in names)
        lines.append(f"| {kind} | {cells} | {rows[kind]['bytes'] / 1e6:.1f} |")
    lines += [
        "",
        f"The decode engine got {tokens.external:.0f} prompt tokens from the prefill engine, took {tokens.cached:.0f} "
        f"from its own cache, and computed {tokens.computed:.0f}.",
    ]
    return "\n".join(lines) + "\n"


def _kind(outcome: Outcome) -> str:
    if outcome.case.name.startswith(FORMS):
        return "odd bodies and content types"
    path = outcome.case.path.partition("?")[0]
    return f"`{path}`" if outcome.case.method == "POST" and path in SPLIT else "other endpoints, paths and methods"
