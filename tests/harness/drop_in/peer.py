"""Runs LMCache's real PD backends, each in its own process, without vLLM. Sends or receives chunks in host memory.

    python peer.py SOCKET

The process imports torch and LMCache, and starts backends as forks of itself. The imports need six seconds of CPU time,
which is longer than most tests. Each connection to SOCKET sends one line of JSON, {"options": {"port": 4711, "role":
"receiver", "mode": "async", ...}, "log": ...}. The answer is the id of the fork, which leads its own process group and
writes to the log.

The fork accepts one connection on the given loopback port. Each line is a JSON command. The fork answers each command
with one line of JSON:

    {"do": "put", "req": ..., "to": {...}, "keys": [...], "tokens": ..., "seed": ..., "batch": ...}
    {"do": "get", "keys": [...], "tokens": ...}
    {"do": "keys", "tokens": [...], "algorithm": ...}
    {"do": "cancel", "req": ...}      {"do": "query", "to": {...}, "keys": [...]}      {"do": "held"}

With "folder", `put` reads the bytes of the chunks from files in that folder, and `get` writes them to such files.

The script runs in the environment that `scripts/venv-lmcache.sh` makes, so it imports no module of the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

CHUNK_TOKENS = 256

MODULES = (
    "torch", "nixl._api", "lmcache.utils", "lmcache.v1.config", "lmcache.v1.metadata", "lmcache.v1.memory_management",
    "lmcache.v1.token_database", "lmcache.v1.storage_backend.pd_backend", "lmcache.v1.storage_backend.pd_backend_async",
)  # fmt: skip


@dataclass
class Spec:
    """The same fields as `vllm_v1_adapter.DisaggSpec`, which LMCache's vLLM adapter passes to the backend."""

    req_id: str
    receiver_id: str
    receiver_host: str
    receiver_init_port: list[int]
    receiver_alloc_port: list[int]
    receiver_query_port: list[int] | None = None
    is_last_prefill: bool = False
    num_transferred_tokens: int = 0
    total_chunks: int = 0


class Peer:
    """One backend, sender or receiver."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.metadata import LMCacheMetadata

        self.torch = torch
        layers, heads, head_size = options["layers"], options["kv_heads"], options["head_size"]
        self.width = heads * head_size
        self.layers = layers
        self.chunk_bytes = 2 * layers * CHUNK_TOKENS * self.width * 4
        self.mode = options["mode"]
        rank = options.get("rank", 0)
        names = {
            "enable_pd": True,
            "pd_role": options["role"],
            "pd_buffer_size": self.chunk_bytes * options["slots"],
            "pd_buffer_device": "cpu",
            "pd_backend_mode": self.mode,
            "transfer_channel": "nixl",
            "chunk_size": CHUNK_TOKENS,
            **options.get("config", {}),
        }
        if "file" in options:
            # Read the settings in the order of LMCache's vLLM adapter: first the file, then the environment variables.
            config = LMCacheEngineConfig.from_file(options["file"])
            config.update_config_from_env()
        else:
            config = LMCacheEngineConfig.from_defaults(**names)
        config.validate()
        metadata = LMCacheMetadata(
            model_name=options["model"],
            world_size=options.get("world_size", 1),
            local_world_size=options.get("world_size", 1),
            worker_id=rank,
            local_worker_id=rank,
            kv_dtype=torch.float32,
            kv_shape=(layers, 2, CHUNK_TOKENS, heads, head_size),
        )
        if self.mode == "sync":
            from lmcache.v1.storage_backend.pd_backend import PDBackend as Backend
        else:
            from lmcache.v1.storage_backend.pd_backend_async import PDBackendAsync as Backend
        self.metadata = metadata
        self.backend: Any = Backend(config, metadata)

    def key(self, text: str) -> Any:
        from lmcache.utils import CacheEngineKey

        return CacheEngineKey.from_string(text)

    def keys(self, command: dict[str, Any]) -> dict[str, Any]:
        """Returns the keys that LMCache's own token database gives to the chunks of a prompt."""
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.token_database import ChunkedTokenDatabase

        config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK_TOKENS, pre_caching_hash_algorithm=command["algorithm"], save_unfull_chunk=True
        )
        database = ChunkedTokenDatabase(config, self.metadata)
        return {"keys": [key.to_string() for _, _, key in database.process_tokens(tokens=command["tokens"])]}

    def put(self, command: dict[str, Any]) -> dict[str, Any]:
        """Fills chunks and passes them to the backend in batches, like an engine with chunked prefill."""
        to, keys, tokens = command["to"], command["keys"], command["tokens"]
        # The command has the ports of all ranks; LMCache uses the ports of its own rank.
        name = to["host"] + str(to["init_port"][self.metadata.worker_id])
        spec = Spec(command["req"], name, to["host"], to["init_port"], to["alloc_port"])
        spec.total_chunks = command.get("total_chunks", len(keys))
        step = command.get("batch") or max(1, len(keys))
        written = threading.Semaphore(0)
        errors: list[str] = []
        # The backend also gets a request without chunks: the test observes what the backend does with it.
        for at in range(0, max(1, len(keys)), step):
            spec = Spec(**vars(spec))
            spec.is_last_prefill = at + step >= len(keys) and command.get("last", True)
            objects = [self._filled(command, i, tokens) for i in range(at, min(at + step, len(keys)))]
            batch = [self.key(k) for k in keys[at : at + step]]
            futures = self.backend.batched_submit_put_task(batch, objects, spec, lambda _: written.release())
            for future in futures or []:
                try:
                    future.result(timeout=command.get("timeout_s", 30))
                except Exception as error:  # noqa: BLE001 - LMCache raises anything
                    errors.append(str(error) or type(error).__name__)
            for each in objects:
                each.ref_count_down()
        deadline = time.monotonic() + command.get("timeout_s", 30)
        count = 0
        while not errors and count < len(keys) and written.acquire(timeout=max(0.0, deadline - time.monotonic())):
            count += 1
        return {"written": count, "errors": errors}

    def _filled(self, command: dict[str, Any], index: int, tokens: int) -> Any:
        from lmcache.v1.memory_management import MemoryFormat

        count = min(CHUNK_TOKENS, tokens - index * CHUNK_TOKENS)
        shape = self.torch.Size([2, self.layers, count, self.width])
        found = self.backend.allocate(shape, self.torch.float32, MemoryFormat.KV_2LTD)
        if found is None:
            raise RuntimeError("the send buffer is full")
        if "folder" in command:
            data = bytearray(Path(command["folder"], str(index)).read_bytes())
        else:
            data = bytearray(random.Random(f"{command['seed']}-{index}").randbytes(shape.numel() * 4))
        found.tensor.view(-1).view(self.torch.uint8).copy_(self.torch.frombuffer(data, dtype=self.torch.uint8))
        return found

    def get(self, command: dict[str, Any]) -> dict[str, Any]:
        """Returns the SHA-1 of each chunk, or None for a missing chunk. Removes the chunks unless "keep" is set."""
        sums: list[str | None] = []
        for index, text in enumerate(command["keys"]):
            key = self.key(text)
            if not self.backend.contains(key):
                sums.append(None)
                continue
            found = self.backend.get_blocking(key)
            count = min(CHUNK_TOKENS, command["tokens"] - index * CHUNK_TOKENS)
            assert found.tensor.shape[2] == count, (found.tensor.shape, count)
            data = found.tensor.contiguous().view(-1).view(self.torch.uint8).numpy()
            sums.append(hashlib.sha1(data).hexdigest())
            if "folder" in command:
                Path(command["folder"], str(index)).write_bytes(data.tobytes())
            if not command.get("keep"):
                self._remove(key, found)
        return {"sums": sums}

    def _remove(self, key: Any, found: Any) -> None:
        """Returns a chunk to the backend, as LMCache's cache engine does after a retrieve.

        The backend may give the page to another key at once, so the chunk must not be used afterwards.
        """
        references = found.get_ref_count()
        if self.mode == "async":
            for _ in range(references):
                self.backend.remove(key)
            return
        for _ in range(references - 1):
            found.ref_count_down()
        self.backend.remove(key)
        found.ref_count_down()

    def cancel(self, command: dict[str, Any]) -> dict[str, Any]:
        self.backend.cancel_request(command["req"])
        return {}

    def query(self, command: dict[str, Any]) -> dict[str, Any]:
        to = command["to"]
        self.backend._ensure_cache_query_connection("queried", to["host"], to["query_port"])
        answer = self.backend.query_remote_cache("queried", [self.key(k) for k in command["keys"]])
        return {"keys": answer.cached_keys, "indexes": answer.cached_indexes}

    def held(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"keys": len(self.backend.data)}


def serve(options: dict[str, Any]) -> None:
    """Runs a peer until its connection ends, and then ends the process."""
    peer = Peer(options)
    with socket.create_server(("127.0.0.1", options["port"])) as server:
        connection, _ = server.accept()
    with connection.makefile("rw", buffering=1) as lines:
        for line in lines:
            command = json.loads(line)
            try:
                answer = getattr(peer, command["do"])(command)
            except Exception as error:  # noqa: BLE001 - the answer reports the error
                answer = {"failed": f"{type(error).__name__}: {error}"}
            lines.write(json.dumps(answer) + "\n")
    # Do not close the backend itself: the threads of a receiver would hang.
    os._exit(0)


def become(asked: dict[str, Any]) -> None:
    """Runs a backend in this process, and ends the process."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        serve(asked["options"])
    except BaseException:  # noqa: BLE001 - the process ends here; its log has the cause
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main() -> None:
    for module in MODULES:
        import_module(module)
    # Let the kernel remove ended forks at once. The test notices their end through a pidfd.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(sys.argv[1])
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                with connection.makefile() as lines:
                    asked = json.loads(lines.readline())
                child = os.fork()
                if child == 0:
                    server.close()
                    connection.close()
                    become(asked)
                try:
                    connection.sendall(f"{child}\n".encode())
                except OSError:
                    # The test has closed the connection, so it will never end this fork.
                    os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
