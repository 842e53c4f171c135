"""What a strategy works on, and the one step of arithmetic that all share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.state_flow import StateFlow

Finish = Callable[[], None]
Transitions = Sequence[Tensor | None]


class Task(NamedTuple):
    """The states of some heads in one direction.

    Attributes:
        incoming: to be filled in ``[flow.num_runs, H, K, V]``, zero for runs that receive nothing.
        outgoing: U of this rank's sending runs ``[flow.num_slots, H, K, V]``; slots beyond theirs
            may hold anything, also NaN, and no strategy may read them.
        flow: who sends to whom.
        transitions: for each run step M, broadcastable to ``[H, K, V]``; None where nothing passes.
        cp_group: the ranks of the layout.
        num_blocks: see ``ExchangeChoice``.
    """

    incoming: Tensor
    outgoing: Tensor
    flow: StateFlow
    transitions: Transitions
    cp_group: dist.ProcessGroup
    num_blocks: int


def advance(local: Tensor, transition: Tensor | None, received: Tensor) -> Tensor:
    """The state that a run sends on: ``local + transition received``."""
    return local if transition is None else torch.addcmul(local, transition, received)
