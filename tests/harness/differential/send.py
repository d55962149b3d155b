"""Sends a case as raw HTTP, and reads the whole answer."""

from __future__ import annotations

import http.client
from dataclasses import dataclass
from urllib.parse import urlsplit

from harness.differential.case import Case

TIMEOUT_S = 90.0


@dataclass(frozen=True)
class Got:
    """An answer. The names of the headers are in lower case. The status is 0 if the connection ended without an answer;
    the body is then the error's text.
    """

    status: int
    headers: dict[str, str]
    body: bytes


def send(base: str, case: Case) -> Got:
    """Sends the case to the server at `base`, without following redirects."""
    connection = http.client.HTTPConnection(urlsplit(base).hostname or "", urlsplit(base).port, timeout=TIMEOUT_S)
    try:
        connection.putrequest(case.method, case.path, skip_accept_encoding=True)
        for name, value in case.headers.items():
            connection.putheader(name, value)
        if case.body is not None and "transfer-encoding" not in case.headers:
            connection.putheader("content-length", str(len(case.body)))
        connection.endheaders()
        try:
            for at in range(0, len(case.body or b""), _PIECE):
                connection.send((case.body or b"")[at : at + _PIECE])
        except OSError:
            # The server may answer before it has read the whole body, and then close the connection.
            pass
        response = connection.getresponse()
        return Got(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
    except (OSError, http.client.HTTPException) as error:
        # One case must not end the suite: its name is needed.
        return Got(0, {}, repr(error).encode())
    finally:
        connection.close()


_PIECE = 256 * 1024
