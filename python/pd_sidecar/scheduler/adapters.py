"""Computes digests of LoRA adapters' files, in a thread of its own.

The digest is part of the keys of the adapter's requests, so that KV of an adapter is never used with other weights of
the same name. The files can be gigabytes on a slow disk, so the engine's thread never reads them. Until the digest is
known, requests of the adapter are computed without a transfer (`lora_pending`).

vLLM loads an adapter before its first request, and may load it again later, because vLLM keeps only a limited number of
adapters. vLLM does not tell which files it loaded. So files must not change while an engine serves them. The thread
checks the files again: if an adapter's files have changed, KV of the adapter is no longer moved (`lora`).
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

from vllm.logger import init_logger

from pd_sidecar.scheduler.eligibility import Skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.lora.request import LoRARequest

logger = init_logger("vllm.pd_sidecar.scheduler.adapters")

Stamp = tuple[tuple[str, int, int, int], ...]
"""The files of an adapter: name, bytes, time of the last change, inode."""


@dataclass
class Adapter:
    """An adapter that a request has named."""

    name: str
    path: str
    digest: str = ""
    """Empty until the thread has read the files."""
    stamp: Stamp = ()
    looked: float = 0.0
    """The time of the last check of the files, in monotonic seconds."""
    refused: bool = False
    """True if the files cannot be read, or have changed."""


class Adapters:
    """The digests of the adapters that requests have named. Only the engine's thread calls `digest`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: OrderedDict[tuple[int, str, str], Adapter] = OrderedDict()
        self._work: queue.SimpleQueue[Adapter] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def digest(self, lora: LoRARequest) -> Union[str, Skip]:  # noqa: UP007
        """Returns the digest of the adapter's files, or the reason why its KV is not moved now. Reads no file."""
        if getattr(lora, "load_inplace", False):
            # If an adapter is loaded in place, vLLM reads its files again for each step, but the adapter keeps its name
            # and number.
            return Skip.LORA
        # An adapter that is unloaded and loaded again under the same name has another number.
        key = (lora.lora_int_id, lora.lora_name, lora.lora_path)
        adapter = self._known.get(key)
        if adapter is None:
            adapter = self._known[key] = Adapter(lora.lora_name, lora.lora_path)
            if len(self._known) > MAX_ADAPTERS:
                self._known.popitem(last=False)
            self._look(adapter)
        self._known.move_to_end(key)
        if adapter.refused:
            return Skip.LORA
        if not adapter.digest:
            return Skip.LORA_PENDING
        if self._clock() > adapter.looked + LOOK_S:
            self._look(adapter)
        return adapter.digest

    def _look(self, adapter: Adapter) -> None:
        adapter.looked = self._clock()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pd-sidecar-adapters", daemon=True)
            self._thread.start()
        self._work.put(adapter)

    def _run(self) -> None:
        while True:
            adapter = self._work.get()
            try:
                look(adapter)
            except Exception as error:  # noqa: BLE001 - a thread that ends would leave all adapters pending
                adapter.refused = True
                logger.error(
                    "KV of adapter %s is not moved, its requests are computed here: its files at %s cannot be read: %s",
                    adapter.name,
                    adapter.path,
                    error,
                )


def look(adapter: Adapter) -> None:
    """Computes the digest of an adapter's files. Refuses the adapter if its files had another digest before."""
    from vllm.lora.utils import get_adapter_absolute_path  # finds the folder of an adapter that vLLM has downloaded

    folder = Path(get_adapter_absolute_path(adapter.path))
    stamp = _stamp(folder)
    if stamp == adapter.stamp or adapter.refused:
        return
    began = time.monotonic()
    digest = _digest(folder, stamp)
    if _stamp(folder) != stamp:
        raise OSError("they change while they are read")
    if adapter.digest and adapter.digest != digest:
        adapter.refused = True
        logger.warning(
            "KV of adapter %s is not moved any more, its requests are computed here: its files at %s have changed "
            "since its first request; load other weights under another name, or unload the adapter first",
            adapter.name,
            adapter.path,
        )
        return
    adapter.stamp, adapter.digest = stamp, digest
    logger.info(
        "adapter %s: digest %.16s of its files in %.0f ms", adapter.name, digest, (time.monotonic() - began) * 1e3
    )


def _stamp(folder: Path) -> Stamp:
    """Returns the files that contain an adapter's weights and configuration. Raises `OSError` if there are none."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(PREFIXES))
    if not any(name.startswith("adapter_model") for name in names):
        raise FileNotFoundError(f"{folder} has no file adapter_model.*")
    stats = [(name, (folder / name).stat()) for name in names]
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)


def _digest(folder: Path, stamp: Stamp) -> str:
    whole = hashlib.sha256()
    for name, *_ in stamp:
        with (folder / name).open("rb") as file:
            whole.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


PREFIXES = ("adapter_", "new_embeddings.")
"""The files that vLLM reads: `adapter_config.json`, `adapter_model.*`, and in older versions `new_embeddings.*`."""
LOOK_S = 1.0
"""The shortest time between two checks of the files of one adapter, in seconds."""
MAX_ADAPTERS = 4096
"""Maximum number of adapters whose digests are kept. The least recently used adapter is removed first. If a request
uses a removed adapter again, the thread computes the adapter's digest again.
"""
