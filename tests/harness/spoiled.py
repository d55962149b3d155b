"""A connector whose loads lose a part of the KV, if a file says so.

The variable PD_TEST_SPOIL names the file. This module is the decode engine's `kv_connector_module_path`.

- If the file contains the number of a group, loads lose the KV of this group and do not notice it. A test that shows
  equal texts proves something only if the text depends on each group.
- If the file contains `tokens` or `state`, chunks of tokens or of states never arrive, but the other chunks do. So the
  load fails in its middle.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pd_sidecar.client import Ready
from pd_sidecar.connector import PdSidecarConnector
from pd_sidecar.kv.host_copy import HostCopier
from pd_sidecar.kv.parts_copy import PartsCopier
from pd_sidecar.worker.load import Receiver

__all__ = ["PdSidecarConnector"]


def _told() -> str:
    file = Path(os.environ["PD_TEST_SPOIL"])
    return file.read_text() if file.exists() else ""


def _spoil(copier: Any) -> None:
    scatter = copier.scatter

    def spoiled(self: Any, pieces: Any, *rest: Any) -> Any:
        lost = _told()
        return scatter(self, [piece for piece in pieces if str(piece.part) != lost], *rest)

    copier.scatter = spoiled


for each in (HostCopier, PartsCopier):
    _spoil(each)


_ready = Receiver.ready


def _without_lost_chunks(self: Receiver, message: Ready) -> None:
    incoming, lost = self._by_req.get(message.req), _told()
    if incoming is None or lost not in ("tokens", "state"):
        _ready(self, message)
        return
    plan = self._rank.plan(incoming.start.tokens, message.first_token)
    arrived = [chunk for chunk in message.chunks if plan.is_state(chunk) != (lost == "state")]
    self._release(message.req, [chunk for chunk in message.chunks if chunk not in arrived], 0)
    slots = dict(zip(message.chunks, message.slots, strict=True))
    _ready(self, Ready(message.req, message.first_token, arrived, [slots[chunk] for chunk in arrived]))


Receiver.ready = _without_lost_chunks  # type: ignore[method-assign]
