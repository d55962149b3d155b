"""The stacks that turn prompts into tokens: one plain instance, and this project. baselines.py has the other stacks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from harness.engine import Engine
from harness.process import Part
from harness.proxy import Proxy
from harness.sidecar import CHUNK_TOKENS, ROOT, Sidecar, SidecarOptions

from gpu.setting import UCX, Setting

# The time limit of a request. A request needs less than a tenth of this time; only a stack that hangs reaches the
# limit.
REQUEST_S = 25.0
# The time limit of a request that may be the first of its length: vLLM compiles kernels for it. Those of gated delta
# nets take longer than `REQUEST_S`.
FIRST_REQUEST_S = 180.0


@dataclass
class Handover:
    """One request as the client saw it. All times are seconds since the client sent its first request."""

    text: str = ""
    """The text without white space: a text from two legs has no white space between the parts."""
    first_s: float = 0.0
    """Time of the decode side's first token."""
    times: list[float] = field(default_factory=list)
    """Time of each token of the decode side."""
    parts: dict[str, float] = field(default_factory=dict)
    """Times of steps before the first token, by name, if the stack measures them."""

    @property
    def per_token_s(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else 0.0


class Stack(Protocol):
    """A set of processes that turns prompts into tokens."""

    name: str

    @property
    def parts(self) -> Sequence[Part]: ...
    @property
    def engines(self) -> Sequence[Engine]: ...
    def start(self) -> None: ...
    def wait(self) -> None: ...
    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Handover: ...


class Pair(Stack, Protocol):
    """A stack with a prefill and a decode engine."""

    @property
    def prefill(self) -> Engine: ...
    @property
    def decode(self) -> Engine: ...


class Plain:
    """One instance without any connector, on the GPU that the prefill sides use.

    Until its first token, this instance computes the same as a prefill side.
    """

    name = "plain"

    def __init__(self, setting: Setting) -> None:
        self.engine = setting.engine("plain engine", 0, None)
        self.parts: Sequence[Part] = (self.engine,)
        self.engines = (self.engine,)

    def start(self) -> None:
        self.engine.start()

    def wait(self) -> None:
        """Returns at once, because there is no process besides the engine to wait for."""

    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Handover:
        return await stream(session, self.engine.url, prompt, tokens)


class Ours:
    """This project: two engines, two sidecars and the proxy."""

    def __init__(self, setting: Setting, name: str = "ours") -> None:
        self.name = name
        self.setting = setting
        # Use the system's folder for temporary files, because the path of a unix socket has at most 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="pd-"))
        self.proxy = Proxy(setting.logs)
        self.sender, self.receiver = (self._sidecar(role, side) for side, role in enumerate(("sender", "receiver")))
        self.prefill = self._engine("prefill", "kv_producer", 0, self.sender)
        self.decode = self._engine("decode", "kv_consumer", 1, self.receiver)
        self.parts: Sequence[Part] = (self.proxy, self.sender, self.receiver, self.prefill, self.decode)
        self.engines = (self.prefill, self.decode)

    def start(self) -> None:
        self.proxy.start()
        for part in (self.receiver, self.sender, self.prefill, self.decode):
            part.start()

    def wait(self) -> None:
        for sidecar in (self.sender, self.receiver):
            sidecar.wait_ready()
        self.proxy.wait_ready()

    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Handover:
        return await stream(session, self.proxy.url, prompt, tokens)

    def restart_sidecars(self, buffer_bytes: int, transport: str = "auto", ucx: str = UCX) -> None:
        """Restarts the sidecars with other buffers or another wire. The engines reconnect by themselves."""
        for sidecar in (self.receiver, self.sender):
            sidecar.stop()
            sidecar.options.buffer_bytes = buffer_bytes
            sidecar.options.transport = transport
            if sidecar.options.env:
                sidecar.options.env["UCX_TLS"] = ucx
        for sidecar in (self.receiver, self.sender):
            sidecar.start()
        self.wait()

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _sidecar(self, role: str, side: int) -> Sidecar:
        setting = self.setting
        options = SidecarOptions(
            role,
            setting.buffer_bytes,
            proxy=self.proxy.registration,
            transport=setting.transport,
            device="cpu" if setting.gpus is None else "cuda",
            # `UCX_TLS` below contains tcp, because LMCache and NixlConnector need tcp.
            keys={"nixl_over_tcp": "trusted", **setting.sidecar_keys},
            # Do not set CUDA_VISIBLE_DEVICES: each sidecar must see both GPUs to copy between them.
            env={} if setting.gpus is None else {"UCX_TLS": UCX},
        )
        if setting.gpus is not None:
            options.device = f"cuda:{setting.gpus[side]}"
        return Sidecar(options, self._folder, setting.logs)

    def _engine(self, name: str, role: str, side: int, sidecar: Sidecar) -> Engine:
        transfer = {
            "kv_connector": "PdSidecarConnector",
            "kv_connector_module_path": "pd_sidecar.connector",
            "kv_role": role,
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                f"{sidecar.options.role}_socket": str(sidecar.socket),
                "chunk_size": CHUNK_TOKENS,
                "push": self.setting.push,
                "allow_several_groups": True,
            },
        }
        engine = self.setting.engine(f"ours {name}", side, transfer, {"PYTHONPATH": with_path(ROOT / "python")})
        sidecar.options.engine_url = engine.url
        return engine


def other_push(setting: Setting) -> Ours:
    """Makes a second stack of this project, with the other value of `push`."""
    other = "auto" if setting.push == "step" else "step"
    name = f"ours-{other}"
    return Ours(replace(setting, push=other, folder=setting.folder / name), name)


class FirstOfPrefill:
    """The stack `ours` while its proxy takes the first token from the prefill leg."""

    name = "ours, first of prefill"

    def __init__(self, ours: Ours) -> None:
        self.parts: Sequence[Part] = ()
        self.engines = ours.engines
        self._ours = ours

    @contextlib.contextmanager
    def started(self) -> Iterator[None]:
        """Restarts the proxy with this mode for the duration of the block. The sidecars register with the new proxy."""
        with self._ours.proxy.flags("--first-token", "prefill"):
            self._ours.proxy.wait_ready()
            yield
        self._ours.proxy.wait_ready()

    def start(self) -> None:
        """Does nothing, because the stack `ours` is already running."""

    def wait(self) -> None:
        self._ours.wait()

    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Handover:
        return await self._ours.complete(session, prompt, tokens)


def at_once(stack: Stack, prompts: Sequence[list[int]], tokens: int) -> list[Handover | BaseException]:
    """Sends all prompts at the same moment. Returns, for each prompt, the answer or the exception."""

    async def all_of_them() -> list[Handover | BaseException]:
        async with client() as session:
            asks = (stack.complete(session, prompt, tokens) for prompt in prompts)
            return await asyncio.gather(*asks, return_exceptions=True)

    return asyncio.run(all_of_them())


def body(prompt: list[int], tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def once(session: aiohttp.ClientSession, url: str, prompt: list[int], params: dict[str, Any]) -> dict[str, Any]:
    """Sends a prefill leg and returns its answer."""
    async with session.post(f"{url}/v1/completions", json=body(prompt, 1, kv_transfer_params=params)) as reply:
        await fail_unless_ok(reply)
        answer: dict[str, Any] = await reply.json()
        return answer


async def stream(
    session: aiohttp.ClientSession,
    url: str,
    prompt: list[int],
    tokens: int,
    *,
    began: float | None = None,
    **more: Any,
) -> Handover:
    """Sends a streamed completion and returns its text and times."""
    began = time.perf_counter() if began is None else began
    result = Handover()
    async with session.post(f"{url}/v1/completions", json=body(prompt, tokens, stream=True, **more)) as reply:
        await fail_unless_ok(reply)
        async for line in reply.content:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(f"{url}: {event['error']}")
            if text := "".join(choice["text"] for choice in event["choices"]):
                result.times.append(time.perf_counter() - began)
                result.text += joined(text)
    if not result.times:
        raise RuntimeError(f"{url}: an answer without tokens")
    result.first_s = result.times[0]
    return result


def joined(text: str) -> str:
    return "".join(text.split())


async def fail_unless_ok(reply: aiohttp.ClientResponse) -> None:
    if reply.status != 200:
        raise RuntimeError(f"{reply.url}: HTTP {reply.status}: {(await reply.text())[:300]}")


def with_path(folder: Path) -> str:
    """Returns the current PYTHONPATH with `folder` in front."""
    return f"{folder}{os.pathsep}{os.environ['PYTHONPATH']}" if os.environ.get("PYTHONPATH") else str(folder)


@contextlib.asynccontextmanager
async def client(request_s: float = REQUEST_S) -> Any:
    """Opens a session without a limit on the number of requests at the same time."""
    timeout = aiohttp.ClientTimeout(total=request_s)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield session
