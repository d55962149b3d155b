"""Tells the proxy to send no more requests to this pod's engine. Runs as the preStop hook of the engine's container.

Kubernetes ends the engine before the sidecar. Without this hook the proxy would send requests to an engine that is
ending, until a request or a call-back fails. The hook sends the first admin key of the secret pd-proxy.
"""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

PROXY = os.environ.get("PD_PROXY_URL", "http://pd-proxy:8000")
NAME = os.environ["PD_SIDECAR_ID"]

lines = Path(os.environ["PD_PROXY_ADMIN_KEY_FILE"]).read_text().splitlines()
KEY = next(line.strip() for line in lines if line.strip() and not line.startswith("#"))
request = urllib.request.Request(
    f"{PROXY}/instances/{NAME}/drain", method="POST", headers={"authorization": f"Bearer {KEY}"}
)
try:
    urllib.request.urlopen(request, timeout=5).close()
except urllib.error.HTTPError as error:
    # The proxy does not know an instance that never became ready.
    if error.code != 404:
        sys.exit(f"{PROXY} refuses to drain {NAME}: {error.code} {error.read(500).decode(errors='replace')}")
except OSError as error:
    sys.exit(f"{PROXY} does not answer: {error}")
