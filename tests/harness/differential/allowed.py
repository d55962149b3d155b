"""The differences between the proxy and one vLLM that stay, each with its reason.

`docs/proxy/differences.md` shows the list as a table. A test compares the page with the list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.differential.case import Case
from harness.differential.compare import Difference


@dataclass(frozen=True)
class Allowed:
    """One kind of difference."""

    # A sentence for users: the requests, and the two answers.
    what: str
    # The reason for which the difference stays.
    why: str
    # Regular expression for the whole place of a difference.
    where: str
    # Regular expression for a part of the case's name.
    cases: str = ""
    # Regular expression for the only parts in which the two texts may differ; empty if everything may differ.
    parts: str = ""

    def covers(self, case: Case, difference: Difference) -> bool:
        if re.search(self.cases, case.name) is None or re.fullmatch(self.where, difference.where) is None:
            return False
        plain, ours = (re.sub(self.parts, "", str(text)) for text in (difference.plain, difference.ours))
        return not self.parts or plain == ours

    def is_used(self, outcomes: Iterable[Any]) -> bool:
        """Returns true if some outcome has such a difference."""
        return any(self.covers(one.case, difference) for one in outcomes for difference in one.differences())


def reason(case: Case, difference: Difference) -> str | None:
    """Returns the reason for which a difference is allowed; None if it is a fault of the proxy."""
    return next((allowed.why for allowed in ALLOWED if allowed.covers(case, difference)), None)


def table() -> str:
    """Returns the list as a table in Markdown."""
    rows = [f"| {allowed.what} | {allowed.why} |" for allowed in ALLOWED]
    return "\n".join(["| difference | reason |", "|---|---|", *rows]) + "\n"


_METHODS = r"^(GET|HEAD|OPTIONS|POST|PUT|PATCH|DELETE|BREW) /"
_ERROR = r"body\.(error|detail)(\..*)?"

ALLOWED: tuple[Allowed, ...] = (
    Allowed(
        "Every answer of an endpoint of the engines has the header `X-Request-Id`. vLLM sends it only with "
        "`--enable-request-id-headers`.",
        "The id names the request in the logs of the proxy, of both sidecars and of both engines.",
        "header x-request-id",
    ),
    Allowed(
        "If the client's `X-Request-Id` has other characters than letters, digits, `-`, `_` and `.`, the answer's `id` "
        "does not have them.",
        "The id stands in the logs of five programs, in lines that other programs read.",
        r"body\.id",
        "^body: an odd id in a header",
    ),
    Allowed(
        "`system_fingerprint` differs.",
        "It names the configuration of the decode engine, which has a connector.",
        r"body\..*system_fingerprint",
    ),
    Allowed(
        "Numbers of cached tokens differ.",
        "They are the numbers of the prefill engine's prefix cache ([cached tokens](overview.md#a-request)). The plain "
        "engine of the suite has no prefix cache.",
        r"body\..*(cached_tokens|cache_write_tokens|cache_(read|creation)_input_tokens|created_cache_tokens)",
    ),
    Allowed(
        "The answer to an unknown path or a wrong method has the same status, but a body in OpenAI's form instead of "
        '`{"detail": ...}`.',
        "The message names the path and the method.",
        _ERROR,
        _METHODS,
    ),
    Allowed(
        "If the body is no JSON object, the 400 has another message, and the proxy's own `type`, `code` and `param`.",
        "The proxy reads a body before it chooses instances. The proxy cannot pass on a body that it cannot read, "
        "because the body may hide transfer parameters.",
        _ERROR,
        r"^body: (empty|blank|null|a list|a number|a string|cut|trailing comma|single quotes|two objects|no UTF-8|"
        r"not quoted|a control character|a comment)",
    ),
    Allowed(
        "If the content type is not JSON, the 400 has another message, and the proxy's own `type` and `code`.",
        "The message names the content type of the request, and the cure.",
        _ERROR,
        "^content type ",
    ),
    Allowed(
        "A body over `--max-body-bytes` (16 MiB) gets 413. vLLM has no limit.",
        "Without a limit, clients could fill the proxy's memory.",
        r"status|body\..*|header .*",
        "^body: oversized",
    ),
    Allowed(
        "A client's `kv_transfer_params` gets 400, unless it is `null`.",
        "The field names hosts to which engines connect.",
        r"status|body\..*|header .*",
        "own transfer parameters",
    ),
    Allowed(
        "The proxy's own answers have no CORS headers, and a preflight gets 405.",
        "Without an answer to a preflight, a page of another site cannot send JSON to the proxy "
        "([security.md](security.md#keys)). Browsers reach an engine pool only through a gateway.",
        r"header (vary|access-control-.*)",
    ),
    Allowed(
        "A preflight gets 405 instead of an answer of vLLM's CORS middleware.",
        "As in the row above.",
        r"status|body.*|header (allow|content-type)",
        "^preflight",
    ),
    Allowed(
        "HEAD is answered as GET is, on the paths that take GET. vLLM answers 405.",
        "Load balancers probe with HEAD, and HTTP asks servers to answer it.",
        "status|header (allow|content-type|retry-after)",
        "^(HEAD|OPTIONS|PUT|DELETE|PATCH|POST) /(v1/models|health)$",
    ),
    Allowed(
        "`GET /health` shows the proxy's own health, with a JSON body. vLLM's body is empty.",
        "The proxy lives without engines. `GET /ready` says whether a decode instance is ready.",
        "body.*|header content-type",
        "^GET /health",
    ),
    Allowed(
        "An unknown method gets 405. vLLM's HTTP server answers 400 in plain text.",
        "The two HTTP servers differ.",
        "status|body.*|header (allow|content-type)",
        "^BREW ",
    ),
    Allowed(
        "[Absent endpoints](overview.md#endpoints-that-are-absent) get 404. `/metrics` shows the proxy's own metrics.",
        "The page names the reason for each endpoint.",
        "status|body.*|header .*",
        r"^GET /(docs|openapi.json|metrics|server_info|is_sleeping)|^render |^load an adapter",
    ),
    Allowed(
        "In the text of an error, the number of fields of the body differs.",
        "The refusal can come from the prefill engine, whose request has more fields than the client's.",
        r"body\.error\.message",
        parts=r"<dict of \d+ items>",
    ),
)
