"""A connector whose loads lose the KV of one group, if a file says so.

A test that shows equal texts proves something only if the text depends on each group. This module is the decode
engine's `kv_connector_module_path`. The variable PD_TEST_SPOIL names the file, which contains the group's number.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pd_sidecar.connector import PdSidecarConnector
from pd_sidecar.kv.host_copy import HostCopier
from pd_sidecar.kv.parts_copy import PartsCopier

__all__ = ["PdSidecarConnector"]


def _spoil(copier: Any) -> None:
    scatter = copier.scatter

    def spoiled(self: Any, pieces: Any, *rest: Any) -> Any:
        file = Path(os.environ["PD_TEST_SPOIL"])
        lost = int(file.read_text()) if file.exists() else None
        return scatter(self, [piece for piece in pieces if piece.part != lost], *rest)

    copier.scatter = spoiled


for each in (HostCopier, PartsCopier):
    _spoil(each)
