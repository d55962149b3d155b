"""Keeps KV for routers that name no receiver: the prefill engine keeps the KV, and the decode side fetches the KV.

The prefill leg sets only `do_remote_decode`. The answer's `kv_transfer_params` have the fields of vLLM's NixlConnector,
because routers check these fields and pass them on. One more field, `pd`, tells our decode side where the KV is. The
router puts the whole object into the decode leg.

All numbers in the answer are below 2**53, and epochs are text: a router may decode numbers as floats.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True)
class FetchPort:
    """The fetch port of one rank of a prefill side's sidecar."""

    host: str
    port: int
    epoch: int
    """The epoch of the sidecar at this rank; 0 if it is not known."""


@dataclass(frozen=True)
class KeptSource:
    """The place from which a decode request fetches its KV."""

    token: str
    ports: tuple[FetchPort, ...]
    """One fetch port per rank."""
    keep_ms: int


@dataclass(frozen=True)
class KeepPolicy:
    """The limits of the KV that this engine keeps."""

    engine_id: str
    keep_ms: int
    """Milliseconds for which KV is kept if the decode side sends no message."""
    blocks: int
    """The largest number of blocks that may be kept at the same time. The other blocks serve new requests. If there
    were no limit, two engines that keep KV for each other's queues would wait until the KV expires.
    """


@dataclass
class Keeping:
    """The KV that this engine keeps, and the fetch ports of its sidecar."""

    policy: KeepPolicy | None = None
    ports: dict[int, FetchPort] = field(default_factory=dict)
    """Fetch port of each rank. Empty until a worker reports that its sidecar can keep KV."""
    pool: BlockPool | None = None
    """The engine's blocks; `None` in a version of vLLM that gives no pool to connectors."""
    is_alone: bool = False
    """True if it is known that this connector is not the child of a MultiConnector."""
    pinned: dict[str, list[KVCacheBlock]] = field(default_factory=dict)
    """Blocks to which this object has references of its own. With these references vLLM can forget the request at once.
    Otherwise vLLM delays the freeing of the blocks, and runs steps without a pause until it frees them. There are no
    such references if there is no pool, or under MultiConnector, where another child may report the same request.
    """
    answers: list[dict[str, Any]] = field(default_factory=list)
    """The answers since the last step that name kept KV. vLLM has not sent them yet when it passes on the workers'
    report of the same step.
    """
    _blocks: dict[str, int] = field(default_factory=dict)

    def learn(self, ports: Mapping[int, FetchPort | None], *, is_alone: bool = False) -> None:
        """Stores the fetch ports that a worker reports; `None` for a rank without a sidecar or without a fetch port."""
        self.is_alone = is_alone
        for rank, port in ports.items():
            if port is None:
                self.ports.pop(rank, None)
            else:
                self.ports[rank] = port

    def is_possible(self, ranks: int) -> bool:
        """Returns true if every one of these ranks has a fetch port."""
        return self.policy is not None and all(rank in self.ports for rank in range(ranks))

    def hold(self, engine_id: str, blocks: Sequence[int]) -> bool:
        """Holds the request's blocks if they are within the limit, and returns true in this case."""
        if self.policy is None or sum(self._blocks.values()) + len(blocks) > self.policy.blocks:
            return False
        self._blocks[engine_id] = len(blocks)
        if self.pool is not None and self.is_alone:
            self.pinned[engine_id] = [self.pool.blocks[block] for block in blocks]
            self.pool.touch(self.pinned[engine_id])
        return True

    def release(self, engine_id: str) -> bool:
        """Releases the request's blocks. Returns true if they were held."""
        if self.pool is not None and (pinned := self.pinned.pop(engine_id, None)) is not None:
            # Free the last block first, as vLLM does: other requests can reuse the beginning of a prompt more often
            # than its end.
            self.pool.free_blocks(reversed(pinned))
        return self._blocks.pop(engine_id, None) is not None

    @property
    def keep_ms(self) -> int:
        """The milliseconds for which KV is kept if the decode side sends no message."""
        return self.policy.keep_ms if self.policy is not None else 0

    def answer(self, token: str, tokens: int) -> dict[str, Any]:
        """Returns the `kv_transfer_params` of a prefill leg's answer whose KV is kept under this token."""
        ports = [self.ports[rank] for rank in sorted(self.ports)]
        answer = {
            **self._fields(),
            "do_remote_prefill": True,
            # Some routers understand an empty list as "nothing was prefilled". Our connector does not read the ids.
            "remote_block_ids": [[1]],
            "remote_request_id": token,
            "remote_host": ports[0].host,
            "remote_port": ports[0].port,
            "tp_size": len(ports),
            "remote_num_tokens": tokens,
            "pd": {
                "v": VERSION,
                "host": ports[0].host,
                "fetch_ports": [port.port for port in ports],
                "epochs": [f"{port.epoch:016x}" for port in ports],
                "keep_ms": self.keep_ms,
            },
        }
        self.answers.append(answer)
        return answer

    def correct_answers(self, ranks: int, reason: str) -> None:
        """Corrects the answers since the last step. If a sidecar restarted before this step, vLLM ended these requests
        before it passed on the workers' report, so the answers name the port of the earlier sidecar. If there is no
        port now, the answers say that nothing is kept, with this reason.
        """
        answers, self.answers = self.answers, []
        for answer in answers:
            if self.is_possible(ranks):
                answer.update(self.answer(answer["remote_request_id"], answer["remote_num_tokens"]))
            else:
                answer.update(self.refusal(reason))
        self.answers = []

    def refusal(self, reason: str) -> dict[str, Any]:
        """Returns the `kv_transfer_params` of a prefill leg's answer whose KV is not kept. The decode side computes."""
        return {**self._fields(), "pd": {"v": VERSION, "reason": reason}}

    def _fields(self) -> dict[str, Any]:
        return {
            "do_remote_prefill": False,
            "do_remote_decode": False,
            "remote_block_ids": [],
            "remote_engine_id": self.policy.engine_id if self.policy is not None else "",
            "remote_request_id": "",
            "remote_host": "",
            "remote_port": 0,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": 0,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
        }


def new_token() -> str:
    """Returns a token that nobody can guess. Any process that has the token can fetch the KV, so no log may contain the
    token.
    """
    return secrets.token_hex(16)


def source_of(params: Mapping[str, Any]) -> KeptSource | None:
    """Reads the decode leg's parameters, which come from the network. Returns `None` if the parameters do not name kept
    KV.
    """
    token, pd = params.get("remote_request_id"), params.get("pd")
    if not isinstance(token, str) or not TOKEN.fullmatch(token) or not isinstance(pd, dict):
        return None
    host, numbers, epochs, keep_ms = pd.get("host"), pd.get("fetch_ports"), pd.get("epochs"), pd.get("keep_ms")
    if pd.get("v") != VERSION or not isinstance(host, str) or not HOST.fullmatch(host):
        return None
    if not isinstance(numbers, list) or not isinstance(epochs, list) or not 0 < len(numbers) == len(epochs):
        return None
    if not all(_is_number(number, 65535) for number in numbers) or keep_ms is None:
        return None
    if not _is_number(keep_ms, MAX_KEEP_MS):
        return None
    if not all(isinstance(epoch, str) and EPOCH.fullmatch(epoch) for epoch in epochs):
        return None
    pairs = zip(numbers, epochs, strict=True)
    ports = tuple(FetchPort(host, int(number), int(epoch, 16)) for number, epoch in pairs)
    return KeptSource(token, ports, int(keep_ms))


def _is_number(value: Any, most: int) -> bool:
    # A router may have turned an integer into a float.
    return type(value) in (int, float) and 0 < value <= most and value == int(value)


VERSION = 1
TOKEN = re.compile(r"[0-9a-f]{32}")
EPOCH = re.compile(r"[0-9a-f]{16}")
HOST = re.compile(r"[\w.:\[\]%-]{1,253}", re.ASCII)
"""A name or an address, also of IPv6 with its zone."""
MAX_KEEP_MS = 3_600_000
"""The longest time that a decode side accepts from the network."""
