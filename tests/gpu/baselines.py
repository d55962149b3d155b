"""The baselines of the GPU benchmark: vLLM's NixlConnector and LMCache's PD."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
from harness.engine import Engine
from harness.ports import free_port
from harness.process import Part
from harness.sidecar import BINARIES, ROOT

from gpu.setting import Setting
from gpu.stacks import REQUEST_S, Handover, Ours, Plain, Stack, joined, once, other_push, stream, with_path


class _TwoEngines:
    """Two engines without any other process."""

    def __init__(self, prefill: Engine, decode: Engine) -> None:
        self.prefill, self.decode = prefill, decode
        self.parts: Sequence[Part] = (prefill, decode)
        self.engines = (prefill, decode)

    def start(self) -> None:
        for engine in self.engines:
            engine.start()

    def wait(self) -> None:
        """Returns at once, because there are no processes besides the engines to wait for."""


class _ByRouter(_TwoEngines):
    """Two engines that a router drives with NixlConnector's contract: the prefill leg names no receiver, and its answer
    goes into the decode leg. The client itself makes both calls, so that no router's time is part of the figures.
    """

    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Handover:
        began = time.perf_counter()
        ask: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
        ask |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        answer = await once(session, self.prefill.url, prompt, ask)
        between = time.perf_counter() - began
        result = await stream(
            session, self.decode.url, prompt, tokens, began=began, kv_transfer_params=answer["kv_transfer_params"]
        )
        result.parts["prefill_leg_s"] = between
        return result


class OneFlag(_ByRouter):
    """Two engines of this project without any setting besides the connector. Each of them starts its own sidecar."""

    name = "ours by router"

    def __init__(self, setting: Setting) -> None:
        transfer = {
            "kv_connector": "PdSidecarConnector",
            "kv_connector_module_path": "pd_sidecar.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"allow_several_groups": True},
        }
        env = {
            "PYTHONPATH": with_path(ROOT / "python"),
            "PD_SIDECAR_BINARY": str(BINARIES / "sidecar"),
            # The UCX_TLS of all stacks contains tcp.
            "PD_SIDECAR_NIXL_OVER_TCP": "trusted",
        }
        sides = (
            setting.engine(f"one flag {name}", side, transfer, env) for side, name in enumerate(("prefill", "decode"))
        )
        super().__init__(*sides)


class Nixl(_ByRouter):
    """Two engines with vLLM's own connector, and the two calls that vLLM's proxies make."""

    name = "nixl"

    def __init__(self, setting: Setting) -> None:
        transfer: dict[str, Any] = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        if setting.gpus is None:
            transfer["kv_buffer_device"] = "cpu"
        super().__init__(
            *(
                setting.engine(
                    f"nixl {name}",
                    side,
                    transfer,
                    {
                        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                    },
                )
                for side, name in enumerate(("prefill", "decode"))
            )
        )


class LmCache(_TwoEngines):
    """Two engines with LMCache's PD over NIXL. The prefill leg gives the first token, and the decode leg gives the
    other tokens.
    """

    name = "lmcache"

    def __init__(self, setting: Setting) -> None:
        self._init, self._alloc, self._notices = free_port(), free_port(), free_port()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._listener: asyncio.Task[None] | None = None
        common = {
            "local_cpu": False,
            "enable_pd": True,
            "transfer_channel": "nixl",
            "pd_buffer_size": setting.buffer_bytes,
            "pd_buffer_device": "cuda",
        }
        sides = (
            {"pd_role": "sender", "pd_proxy_host": "127.0.0.1", "pd_proxy_port": self._notices},
            {
                "pd_role": "receiver",
                "pd_peer_host": "127.0.0.1",
                "pd_peer_init_port": self._init,
                "pd_peer_alloc_port": self._alloc,
            },
        )
        more: tuple[dict[str, int], ...] = ({}, {"skip_last_n_tokens": 1})
        engines = []
        # LMCache's guide turns prefix caching off.
        setting = replace(setting, prefix_caching=False)
        for side, name in enumerate(("prefill", "decode")):
            path = setting.folder / f"lmcache-{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(common | sides[side]))
            transfer = {
                "kv_connector": "LMCacheConnectorV1",
                "kv_role": ("kv_producer", "kv_consumer")[side],
                "kv_connector_extra_config": {
                    "discard_partial_chunks": False,
                    "lmcache_rpc_port": f"pd-{name}",
                    **more[side],
                },
            }
            env = {"LMCACHE_CONFIG_FILE": str(path), "PYTHONHASHSEED": "0"}
            engines.append(setting.engine(f"lmcache {name}", side, transfer, env))
        super().__init__(*engines)

    async def complete(self, session: aiohttp.ClientSession, prompt: list[int], tokens: int) -> Handover:
        if self._listener is None:
            self._listener = asyncio.create_task(self._listen())
        req = uuid.uuid4().hex
        done = self._waiting[req] = asyncio.get_running_loop().create_future()
        began = time.perf_counter()
        spec = {
            "req_id": req,
            "receiver_host": "127.0.0.1",
            "receiver_init_port": [self._init],
            "receiver_alloc_port": [self._alloc],
        }
        answer = await once(session, self.prefill.url, prompt, {"ret_first_tok": True, "disagg_spec": spec})
        between = time.perf_counter() - began
        async with asyncio.timeout(REQUEST_S):
            await done
        notice = time.perf_counter() - began
        first: int = answer["kv_transfer_params"]["first_tok"]
        result = await stream(session, self.decode.url, [*prompt, first], tokens - 1, began=began)
        result.text = joined(answer["choices"][0]["text"]) + result.text
        result.parts |= {"prefill_leg_s": between, "notice_s": notice}
        return result

    async def _listen(self) -> None:
        import msgspec
        import zmq
        import zmq.asyncio

        socket = zmq.asyncio.Context().socket(zmq.PULL)
        socket.bind(f"tcp://127.0.0.1:{self._notices}")
        while True:
            message = msgspec.msgpack.decode(await socket.recv())
            if (waiting := self._waiting.pop(message["req_id"], None)) is not None and not waiting.done():
                waiting.set_result(None)


STACKS: dict[str, Callable[[Setting], Stack]] = {
    "plain": Plain,
    "ours": Ours,
    "router": OneFlag,
    "nixl": Nixl,
    "lmcache": LmCache,
    "other": other_push,
}
