"""Runs the whole system: a prefill and a decode engine, a sidecar for each, and the proxy in front."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.client import Answer, complete, post_json
from harness.engine import Engine, EngineOptions, wait_for
from harness.metrics import PromptTokens
from harness.model import KV_BYTES_PER_TOKEN
from harness.process import leave_running
from harness.progress import Progress
from harness.proxy import Proxy
from harness.sidecar import CHUNK_TOKENS, ROOT, START_BOUND_S, Sidecar, SidecarOptions
from harness.store import Store, below

CHUNK_BYTES = CHUNK_TOKENS * KV_BYTES_PER_TOKEN

# 64 chunks. Eight requests of 1500 tokens at the same time need fewer chunks.
BUFFER_BYTES = 64 * CHUNK_BYTES


@dataclass
class PairOptions:
    """The options of a pair."""

    model: Path
    logs: Path
    prefill_block: int = 32
    prefill_batched_tokens: int | None = 256
    decode_block: int = 64
    # Number of tensor-parallel workers of each side, and number of ranks into which the KV is divided.
    prefill_workers: int = 1
    decode_workers: int = 1
    ranks: int = 1
    # True if the engines start in half the time; see `EngineOptions.forked`.
    forked: bool = False
    # Prefix of the names of the processes and of their log files.
    prefix: str = ""
    transport: str = "auto"
    # Size of each rank's buffer.
    buffer_bytes: int = BUFFER_BYTES
    more: tuple[str, ...] = ()
    # Further flags of the decode engine.
    decode_more: tuple[str, ...] = ()
    lora: dict[str, Path] = field(default_factory=dict)
    sidecar_keys: dict[str, object] = field(default_factory=dict)
    # The modules of the two connectors.
    prefill_module: str = "pd_sidecar.connector"
    decode_module: str = "pd_sidecar.connector"
    # Further options of both connectors.
    connector: dict[str, object] = field(default_factory=dict)
    # Further variables of the engines.
    env: dict[str, str] = field(default_factory=dict)
    # A store below both engines, or None. Then both engines need the same block.
    store: Store | None = None


@dataclass(frozen=True)
class Moved:
    """One request through the proxy, with its answer, its records and its token counts."""

    answer: Answer
    request_id: str
    # The decode engine's counts, only for this request.
    tokens: PromptTokens
    sender: dict[str, Any]
    receiver: dict[str, Any]

    def check(self, expect: list[int], prompt_tokens: int, *, cached: int = 0) -> None:
        """Asserts that the text is right, and that the KV was moved and used, which the text alone does not show."""
        assert self.answer.token_ids == expect
        wanted = (prompt_tokens - cached) * KV_BYTES_PER_TOKEN
        for record in (self.sender, self.receiver):
            # The reason first: if no KV was moved, the record says why.
            assert record["reason"] is None, (record, self.tokens)
            assert record["bytes"] == wanted, (record, wanted)
            assert record["have_tokens"] == cached, record
        check_tokens(self.tokens, prompt_tokens, cached=cached)


def check_tokens(tokens: PromptTokens, prompt_tokens: int, *, cached: int = 0, requests: int = 1) -> None:
    """Asserts that the decode engine computed at most the last token of each request, which every engine must compute.

    All other KV came through the connector or from the engine's own cache.
    """
    assert tokens.external + tokens.cached + tokens.computed == prompt_tokens, tokens
    assert tokens.computed <= requests, tokens
    assert tokens.external >= prompt_tokens - cached - requests, tokens


class Pair:
    """Two engines, two sidecars, one proxy.

    `start` starts all of them at the same time; `wait` returns when the pair can answer requests.
    """

    def __init__(self, options: PairOptions, folder: Path) -> None:
        self.options = options
        self.left_running = False
        logs = options.logs
        self.proxy = Proxy(logs)
        self.sender, self.receiver = (
            Sidecar(
                SidecarOptions(
                    role,
                    options.buffer_bytes,
                    proxy=self.proxy.registration,
                    transport=options.transport,
                    ranks=options.ranks,
                    keys=dict(options.sidecar_keys),
                ),
                folder,
                logs,
                name=f"{options.prefix}{role}-sidecar",
            )
            for role in ("sender", "receiver")
        )
        self.prefill = Engine(self._prefill(options.prefill_workers), logs)
        self.decode = Engine(self._decode(options.decode_workers), logs)
        self.sender.options.engine_url = self.prefill.url
        self.receiver.options.engine_url = self.decode.url
        self._standard = {part.name: replace(part.options) for part in (self.sender, self.receiver)}

    def start(self, progress: Progress | None = None) -> None:
        """Starts all processes and returns when the sidecars listen; the engines are then still loading."""
        self.proxy.start()
        if progress is not None:
            progress.say("starting two vLLM instances and their sidecars (half a minute to a minute and a half)")
        for engine in (self.decode, self.prefill):
            engine.start()
        for sidecar in (self.receiver, self.sender):
            sidecar.start()
            if progress is not None:
                progress.say(f"{sidecar.name}: listening, admin server at {sidecar.admin}")

    def wait(self, progress: Progress | None = None) -> None:
        """Returns when both engines serve, both sidecars are ready, and the proxy knows both instances."""
        wait_for((self.decode, self.prefill), progress)
        self.wait_sidecars()
        if progress is not None:
            progress.say(f"proxy: both instances registered and ready, at {self.proxy.url}")
        for engine in (self.decode, self.prefill):
            engine.warm_up()

    def wait_sidecars(self, bound_s: float = 60.0) -> None:
        """Returns when the sidecars and the proxy are ready again after a restart of sidecars, proxy or engines."""
        self.sender.wait_ready(bound_s)
        self.receiver.wait_ready(bound_s)
        self.proxy.wait_ready(bound_s)

    def restart_sidecars(self, *, landing_bytes: int | None = None, **changes: Any) -> None:
        """Restarts only the sidecars, with the standard options and `changes`. The engines reconnect automatically."""
        for sidecar in (self.receiver, self.sender):
            sidecar.options = replace(self._standard[sidecar.name], **changes)
            sidecar.stop()
        if landing_bytes is not None:
            self.receiver.options.buffer_bytes = landing_bytes
        for sidecar in (self.receiver, self.sender):
            sidecar.start()
        self.wait_sidecars()

    def restore(self) -> None:
        """Restarts the sidecars with the standard options, if an option differs or a sidecar is not running."""
        parts = (self.receiver, self.sender)
        if any(part.options != self._standard[part.name] or not part.running for part in parts):
            self.restart_sidecars()

    def reset_prefix_caches(self) -> None:
        for engine in (self.prefill, self.decode):
            engine.reset_prefix_cache()

    def stop(self) -> None:
        """Stops all parts, in an order in which each part can still report its end to the others."""
        parts = (self.proxy, self.sender, self.receiver, self.prefill, self.decode)
        errors = []
        for part in parts:
            try:
                part.stop()
            except Exception as error:  # noqa: BLE001 - the other parts have to be stopped too
                errors.append(error)
        if errors:
            raise errors[0]

    @contextlib.contextmanager
    def another_decoder(
        self, change: Callable[[EngineOptions], EngineOptions], registered: Callable[[Engine], bool]
    ) -> Iterator[tuple[Engine, Sidecar]]:
        """Runs a second decode instance at the same proxy inside the block.

        `change` returns the engine's options, which differ from the first decode engine's. The block begins when
        `registered` returns true.
        """
        # The folder is not inside the repository, because the path of a unix socket has at most 107 bytes.
        folder = Path(tempfile.mkdtemp(prefix="pd-"))
        sidecar = Sidecar(replace(self._standard[self.receiver.name]), folder, self.options.logs, "second-receiver")
        options = self._engine("second decode engine", "kv_consumer", self.options.decode_block, None, 1, sidecar)
        engine = Engine(change(options), self.options.logs)
        sidecar.options.engine_url = engine.url
        try:
            sidecar.start()
            engine.start()
            wait_for([engine], Progress())
            engine.warm_up()
            sidecar.wait_ready()
            deadline = time.monotonic() + START_BOUND_S
            while not registered(engine):
                assert time.monotonic() < deadline, self.proxy.instances()
                time.sleep(0.05)
            yield engine, sidecar
        finally:
            for part in (sidecar, engine):
                part.stop()
            shutil.rmtree(folder, ignore_errors=True)

    def leave_running(self) -> list[int]:
        """Lets all processes outlive this interpreter. Returns their process groups, so that a user can stop them."""
        self.left_running = True
        return leave_running()

    def complete(self, prompt: str | list[int], *, max_tokens: int = 24, **more: Any) -> Answer:
        """Sends a completion through the proxy and returns the answer."""
        return complete(self.proxy.url, prompt, max_tokens=max_tokens, **more)

    def move(self, prompt: str | list[int], *, max_tokens: int = 24, **more: Any) -> Moved:
        """Sends a completion through the proxy; returns the answer with its records and token counts.

        No other request may run at the same time, because the engine's counters do not tell requests apart.
        """
        before = self.decode.prompt_tokens()
        answer = self.complete(prompt, max_tokens=max_tokens, **more)
        request_id = answer.headers["x-request-id"]
        # The proxy's record has the reason if no KV was moved; the sidecars do not know this reason.
        routed = self.proxy.record(request_id)
        assert routed["alone"] is None, f"no hand-over: {routed}, instances {self.proxy.instances()}"
        sender, receiver = self.sender.record(request_id), self.receiver.record(request_id)
        return Moved(answer, request_id, self.prompt_tokens_since(before, 1), sender, receiver)

    def legs(
        self,
        req: str,
        prefill: dict[str, Any],
        decode: dict[str, Any],
        *,
        decoder: tuple[Engine, Sidecar] | None = None,
        path: str = "/v1/completions",
    ) -> Any:
        """Sends both legs of a request directly to the engines, and returns the decode leg's answer.

        The bodies of the two legs may differ, as if one side had lost a field.
        """
        engine, receiver = decoder or (self.decode, self.receiver)
        spec = {
            "req_id": req,
            "receiver_host": receiver.host,
            "receiver_init_port": receiver.init_ports,
            "receiver_alloc_port": receiver.alloc_ports,
        }
        push = {"do_remote_decode": True, "disagg_spec": spec}
        load = {"do_remote_prefill": True, "disagg_spec": {"req_id": req}}
        first = {**prefill, "max_tokens": 1, "kv_transfer_params": push}
        told = post_json(self.prefill.url + path, first)["kv_transfer_params"]
        assert told == {"pushed": True, "req_id": req}
        return post_json(engine.url + path, {**decode, "kv_transfer_params": load})

    def prompt_tokens_since(self, before: PromptTokens, at_least: int, *, engine: Engine | None = None) -> PromptTokens:
        """Returns the prompt tokens that an engine has counted since the counts `before` were read.

        The default is the decode engine. Waits up to 60 s for `at_least` tokens: an engine's counters
        change a moment after its answer, and the decode engine may even answer before the prefill engine has counted.
        """
        engine = engine or self.decode
        deadline = time.monotonic() + 60.0
        while True:
            tokens = engine.prompt_tokens() - before
            if tokens.external + tokens.cached + tokens.computed >= at_least or time.monotonic() > deadline:
                return tokens
            time.sleep(0.05)

    def wait_empty(self, bound_s: float = 60.0) -> None:
        """Returns when no engine and no sidecar holds a request, a slot or a KV block."""
        self.wait_engines_idle(bound_s)
        self.sender.wait_empty(bound_s)
        self.receiver.wait_empty(bound_s)

    def wait_engines_idle(self, bound_s: float = 60.0) -> None:
        """Returns when neither engine has a request or holds KV blocks for a request."""
        deadline = time.monotonic() + bound_s
        for engine in (self.prefill, self.decode):
            while (held := (engine.requests(), engine.cache_usage())) != (0, 0.0):
                if time.monotonic() > deadline:
                    raise AssertionError(f"{engine.options.name}: {held[0]} requests, {held[1]:.4f} of its blocks held")
                time.sleep(0.05)

    def restart_engines(self, prefill_workers: int, decode_workers: int) -> None:
        """Restarts the engines whose number of workers changes. The sidecars keep running."""
        changed = []
        for engine, options in (
            (self.prefill, self._prefill(prefill_workers)), (self.decode, self._decode(decode_workers)),
        ):  # fmt: skip
            if engine.options != options:
                engine.stop()
                engine.options = options
                changed.append(engine)
        for engine in changed:
            engine.start()
        wait_for(changed)
        self.wait_sidecars()
        for engine in changed:
            engine.warm_up()

    def _prefill(self, workers: int) -> EngineOptions:
        options = self.options
        name = f"{options.prefix}prefill engine"
        batched = options.prefill_batched_tokens
        return self._engine(name, "kv_producer", options.prefill_block, batched, 0, workers=workers)

    def _decode(self, workers: int) -> EngineOptions:
        name = f"{self.options.prefix}decode engine"
        return self._engine(name, "kv_consumer", self.options.decode_block, None, 1, workers=workers)

    def _engine(
        self,
        name: str,
        kv_role: str,
        block: int,
        batched: int | None,
        core: int,
        sidecar: Sidecar | None = None,
        workers: int = 1,
    ) -> EngineOptions:
        side, own = ("sender", self.sender) if kv_role == "kv_producer" else ("receiver", self.receiver)
        sidecar = sidecar or own
        extra: dict[str, object] = {f"{side}_socket": str(sidecar.socket), "chunk_size": CHUNK_TOKENS}
        extra |= self.options.connector
        module = self.options.prefill_module if kv_role == "kv_producer" else self.options.decode_module
        if workers != self.options.ranks:
            extra["ranks"] = self.options.ranks
        kv_transfer: dict[str, Any] = {
            "kv_connector": "PdSidecarConnector",
            "kv_connector_module_path": module,
            "kv_role": kv_role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
        if self.options.store is not None:
            kv_transfer = below(kv_transfer, self.options.store)
        path = [str(ROOT / "python"), str(ROOT / "tests")]
        if workers > 1:
            path.append(str(ROOT / "tests" / "harness" / "patient"))
        return EngineOptions(
            name,
            self.options.model,
            block_size=block,
            batched_tokens=batched,
            kv_transfer=kv_transfer,
            core=core,
            workers=workers,
            forked=self.options.forked,
            lora=self.options.lora,
            more=self.options.more + (() if kv_role == "kv_producer" else self.options.decode_more),
            env={"PYTHONPATH": os.pathsep.join(path), **self.options.env},
        )


@contextlib.contextmanager
def pair_of(options: PairOptions, progress: Progress | None = None) -> Iterator[Pair]:
    """Starts a pair and yields the pair when it serves. Stops the pair at the end of the block, except after
    `leave_running`.
    """
    # The folder is not inside the repository: with a longer name, a unix socket's path could exceed 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="pd-"))
    pair = Pair(options, folder)
    try:
        pair.start(progress)
        pair.wait(progress)
        yield pair
    finally:
        if not pair.left_running:
            pair.stop()
            shutil.rmtree(folder, ignore_errors=True)
