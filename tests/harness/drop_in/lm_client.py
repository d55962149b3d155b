"""Uses a server of the `lm://` protocol with LMCache's real client, without vLLM.

Each line of standard input is one command, a JSON object with the server's `port`. Each answer is one line. An answer
with `error` has the text of an exception.

    {"do": "types"}                                     puts and gets a value of every format and element type
    {"do": "put", "keys": [...], "bytes": N}            puts one value per key
    {"do": "get", "keys": [...]}                       returns for each key: "same", "other" or "missing"
    {"do": "exist", "keys": [...]}                      returns for each key: true or false
    {"do": "many", "clients": N, "values": M, "bytes": B}  N clients put and get M values each, at the same time

The bytes of a value follow from its key. One process runs all commands, because the imports need six seconds of CPU
time. The script runs in the environment that `scripts/venv-lmcache.sh` makes, so it imports no module of the tests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
import threading
import time
import traceback
from typing import Any

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_allocators.ad_hoc_memory_allocator import AdHocMemoryAllocator
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.protocol import DTYPE_TO_INT
from lmcache.v1.storage_backend.connector.lm_connector import LMCServerConnector

TENSORS = ("KV_2LTD", "KV_T2D", "KV_2TD", "KV_MLA_FMT")


class Backend:
    """The part of LMCache's LocalCPUBackend that its client uses: settings, and memory for what it receives."""

    def __init__(self) -> None:
        self.config = LMCacheEngineConfig.from_defaults(chunk_size=256)
        self.metadata = LMCacheMetadata(
            model_name="org/model",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(2, 2, 256, 2, 16),
        )
        self._allocator = AdHocMemoryAllocator("cpu")

    def allocate(self, shape: Any, dtype: Any, fmt: Any) -> Any:
        return self._allocator.allocate(shape, dtype, fmt)


class Client:
    """One connection. LMCache's client is asynchronous, so it has a loop of its own."""

    def __init__(self, port: int) -> None:
        self.backend = Backend()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self._connector = LMCServerConnector("127.0.0.1", port, self.loop, self.backend)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=120)

    def put(self, key: Any, value: Any) -> None:
        self.run(self._connector.put(key, value))

    def get(self, key: Any) -> Any:
        return self.run(self._connector.get(key))

    def exist(self, key: Any) -> bool:
        return bool(self._connector.exists_sync(key))


def key_of(name: str, dtype: Any = torch.bfloat16) -> Any:
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return CacheEngineKey("org/model", 1, 0, digest, dtype)


def content(name: str, size: int) -> Any:
    """Returns bytes that follow from the name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def value_of(client: Client, name: str, shape: Any, dtype: Any, fmt: Any) -> Any:
    value = client.backend.allocate(torch.Size(shape), dtype, fmt)
    size = len(value.byte_array)
    torch.frombuffer(value.byte_array, dtype=torch.uint8).copy_(content(name, size))
    return value


def is_same(name: str, value: Any) -> bool:
    raw = bytes(value.byte_array)
    return bool(raw == content(name, len(raw)).numpy().tobytes())


def types(port: int) -> dict[str, Any]:
    client, done = Client(port), []
    for fmt in (MemoryFormat[name] for name in TENSORS):
        shape = (2, 2, 256, 32) if fmt == MemoryFormat.KV_2LTD else (2, 256, 32)
        for dtype in (dtype for dtype in DTYPE_TO_INT if dtype is not None):
            name = f"{fmt.name}-{dtype}"
            client.put(key_of(name, dtype), value_of(client, name, shape, dtype, fmt))
            got = client.get(key_of(name, dtype))
            meta = got.metadata
            assert is_same(name, got), name
            assert (tuple(meta.shape), meta.dtype, meta.fmt) == (shape, dtype, fmt), (name, meta)
            done.append(name)
    return {"types": done}


def shape_for(size: int) -> tuple[int, ...]:
    return 1, 1, size // 64, 32


def put(port: int, names: list[str], size: int) -> dict[str, Any]:
    client = Client(port)
    for name in names:
        client.put(key_of(name), value_of(client, name, shape_for(size), torch.bfloat16, MemoryFormat.KV_2LTD))
    # The protocol has no answer to a PUT. An answer to a later request on the same connection proves that it was read.
    return {"last": client.exist(key_of(names[-1]))}


def get(port: int, names: list[str]) -> dict[str, Any]:
    client = Client(port)

    def one(name: str) -> str:
        value = client.get(key_of(name))
        return "missing" if value is None else "same" if is_same(name, value) else "other"

    return {"got": [one(name) for name in names]}


def many(port: int, clients: int, values: int, size: int) -> dict[str, Any]:
    wrong: list[str] = []

    def one(number: int) -> None:
        client = Client(port)
        for i in range(values):
            name = f"many-{number}-{i}"
            client.put(key_of(name), value_of(client, name, shape_for(size), torch.bfloat16, MemoryFormat.KV_2LTD))
            value = client.get(key_of(name))
            if value is None or not is_same(name, value):
                wrong.append(name)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"wrong": wrong, "seconds": time.perf_counter() - began}


def exist(port: int, names: list[str]) -> dict[str, Any]:
    client = Client(port)
    return {"exist": [client.exist(key_of(name)) for name in names]}


def run(command: dict[str, Any]) -> dict[str, Any]:
    port = command["port"]
    match command["do"]:
        case "types":
            return types(port)
        case "put":
            return put(port, command["keys"], command["bytes"])
        case "get":
            return get(port, command["keys"])
        case "exist":
            return exist(port, command["keys"])
        case "many":
            return many(port, command["clients"], command["values"], command["bytes"])
    raise ValueError(command)


def main() -> None:
    # LMCache logs to standard output. The answers go to the descriptor that was standard output at the start.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = run(json.loads(line))
        except Exception:  # noqa: BLE001 - the test shows the text
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


main()
