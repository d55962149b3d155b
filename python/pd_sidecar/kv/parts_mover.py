"""Moves the KV of all groups of a worker on a GPU, with one launch for each group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pd_sidecar.kv.layout import LayoutError
from pd_sidecar.kv.states import States
from pd_sidecar.kv.triton_copy import Mover, Plan
from pd_sidecar.kv.triton_states import StateMover, StatePlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pd_sidecar.kv.copier import Piece
    from pd_sidecar.kv.parts import Parts


class PartsPlan:
    """The pieces to move, group by group."""

    def __init__(self, plans: list[tuple[int, Plan | StatePlan]], slots: list[int]) -> None:
        self.plans = plans
        """Each group's index in the layout with the group's pieces."""
        self.slots = slots
        """The slot of each piece."""


class PartsMover:
    """The kernels for all groups."""

    def __init__(self, parts: Parts, slot_bytes: int) -> None:
        self.device = parts.device
        self._is_one = parts.is_one
        # The bytes of a chunk's earlier groups are multiples of these numbers.
        tokens = [part.group.bytes for part in parts.parts if not isinstance(part.pages, States)]
        states = [part.group.bytes for part in parts.parts if isinstance(part.pages, States)]
        self._movers: list[Mover | StateMover] = [
            StateMover(part.pages, slot_bytes, math.gcd(*states))
            if isinstance(part.pages, States)
            else Mover(part.pages, slot_bytes, 0 if parts.is_one else math.gcd(*tokens))
            for part in parts.parts
        ]

    def plan(self, pieces: Sequence[Piece]) -> PartsPlan:
        """Returns the pieces in the form that the kernels read. Raises `LayoutError`."""
        plans: list[tuple[int, Plan | StatePlan]] = []
        for index, mover in enumerate(self._movers):
            own = [piece for piece in pieces if piece.part == index]
            if not own:
                continue
            if isinstance(mover, StateMover):
                plans.append((index, mover.plan(own)))
                continue
            if not (self._is_one or all(piece.has_blocks(mover.pages.block_tokens) for piece in own)):
                raise LayoutError(f"the block table has no block for some tokens of {mover.pages.names[0]}")
            plans.append((index, Plan(mover.pages, own)))
        return PartsPlan(plans, [piece.slot for piece in pieces])

    def move(
        self, plan: PartsPlan, buffer: torch.Tensor, *, gather: bool, layers: tuple[int, int] | None = None
    ) -> None:
        """Launches the kernels on the current stream. `buffer` holds the slots as bytes.

        Only KV of one group is moved by ranges of layers.
        """
        for index, own in plan.plans:
            mover = self._movers[index]
            if isinstance(own, StatePlan):
                assert isinstance(mover, StateMover)
                mover.move(own, buffer, gather=gather)
            else:
                assert isinstance(mover, Mover)
                mover.move(own, buffer, gather=gather, layers=layers)
