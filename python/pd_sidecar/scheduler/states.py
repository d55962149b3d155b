"""The state of a request in the scheduler's half, and this engine's part in transfers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from pd_sidecar.scheduler.eligibility import Skip, Transfer
    from pd_sidecar.scheduler.kept import KeepPolicy
    from pd_sidecar.scheduler.tables import TableRule


class PushPhase(Enum):
    """The phases of a push, as in the diagram of `scheduler`."""

    WAITING = auto()
    RUNNING = auto()
    HELD = auto()


class LoadPhase(Enum):
    """The phases of a load, as in the diagram of `scheduler`."""

    OFFERED = auto()
    PARKED = auto()
    SETTLED = auto()
    ABORTED = auto()


@dataclass
class Push:
    """A prefill request whose KV another engine wants."""

    request: Request
    to: Transfer
    adapter: str = ""
    """The digest of the LoRA adapter's files; empty without an adapter."""
    phase: PushPhase = PushPhase.WAITING
    upto: int = 0
    """The number of computed tokens that the workers know of; 0 again after a preemption."""
    preempted: bool = False
    token: str = ""
    """The name under which the KV is kept; empty if the request names its receiver."""
    tokens: int = 0
    """The number of prompt tokens whose KV moves: the position that the decode side computes next."""


@dataclass
class Load:
    """A decode request whose KV comes from another engine."""

    request: Request
    transfer: Transfer
    adapter: str = ""
    """As in `Push`."""
    phase: LoadPhase = LoadPhase.OFFERED
    have_tokens: int = 0
    backoff: int = 0
    """As `Role.backoff`."""
    source: Load | None = None
    """The request of another sequence whose KV this request copies; `None` for a request that loads."""
    table: list[int] = field(default_factory=list)
    """The blocks of the pushed tokens, as of the last step."""
    preemptions: int = 0
    """The request's number of preemptions when `table` was last replaced. If the request has been preempted since then,
    the table's blocks are gone.
    """

    def is_copyable(self, blocks: int) -> bool:
        """Returns true if the first `blocks` blocks of the table hold the KV of all pushed tokens when the current step
        begins.
        """
        request = self.request
        return (
            request.status.name == "RUNNING"
            and request.num_computed_tokens >= self.pushed_tokens
            and request.num_preemptions == self.preemptions
            and len(self.table) >= blocks
        )

    @property
    def pushed_tokens(self) -> int:
        """The prompt tokens that the other engine pushes, including the tokens that this engine already has. It is the
        position that this engine computes next.
        """
        prompt = self.request.num_prompt_tokens
        return min(self.transfer.tokens or prompt, prompt - self.backoff)


@dataclass(frozen=True)
class Skipped:
    """A request that is computed as if there were no connector."""

    reason: Skip


State = Union[Push, Load, Skipped]  # noqa: UP007


@dataclass(frozen=True)
class Role:
    """This engine's part in transfers."""

    producer: bool
    consumer: bool
    ranks: int
    """The number of ranks into which the two sides split KV."""
    tables: tuple[TableRule, ...]
    """The meaning of the block tables, one for each of vLLM's KV cache groups."""
    keep: KeepPolicy | None = None
    """`None` if this engine keeps no KV for routers that name no receiver."""
    has_prefix_cache: bool = True
    """False if vLLM's prefix cache is off."""

    @property
    def block_tokens(self) -> int:
        """The number of tokens of a block of the first group."""
        return self.tables[0].block_tokens

    @property
    def is_plain(self) -> bool:
        """True for one group of full attention, whose blocks keep what a load has written until the request ends."""
        return len(self.tables) == 1 and not self.backoff

    @property
    def backoff(self) -> int:
        """The number of prompt tokens at the end that the prefill side leaves to the decode side.

        The decode side always computes the last prompt token, and needs the window or the state before this token. If
        the prefill side computed the token, vLLM would free the beginning of the window, and a state cannot go back.
        """
        return int(any(rule.is_partial for rule in self.tables))
