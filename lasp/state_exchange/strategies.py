"""The strategies: each starts on a task and returns what finishes it.

Collectives are asynchronous even where they are waited for at once: with NCCL they then run on the
stream of the group, in one order with those of others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lasp._core.collectives import all_gather_into
from lasp.state_exchange.cost import StateSize, slice_rows
from lasp.state_exchange.scan import start_scan
from lasp.state_exchange.task import Finish, Task, advance


def _start_all_gather(task: Task) -> Finish:
    outgoing, flow = task.outgoing, task.flow
    gathered = outgoing.new_empty(task.cp_group.size(), *outgoing.shape)
    work = all_gather_into(gathered.flatten(0, 1), outgoing, group=task.cp_group, async_op=True)

    def finish() -> None:
        work.wait()
        left = sum(step.receives for step in flow.steps if step.rank == flow.rank)
        state = torch.zeros_like(outgoing[0])
        for step, transition in zip(flow.steps, task.transitions):
            if left == 0:
                break
            if step.receives and step.rank == flow.rank:
                task.incoming[step.run] = state
                left -= 1
            if step.sends:
                state = advance(gathered[step.rank, step.slot], transition, state)

    return finish


class _Slices(NamedTuple):
    """States cut into P slices: ranges of their H K rows, padded to a multiple of P.

    Attributes:
        task: whose states.
        rows: of a slice.
        sends: how many runs of each rank send.
        receives: how many runs of each rank receive.
    """

    task: Task
    rows: int
    sends: list[int]
    receives: list[int]

    def cut(self, states: Tensor) -> Tensor:
        """``[..., H, K, V]`` as slices ``[..., P, rows, V]``."""
        num_ranks, flat = len(self.sends), states.flatten(-3, -2)
        padding = (0, 0, 0, self.rows * num_ranks - flat.shape[-2])
        slices: Tensor = F.pad(flat, padding).unflatten(-2, (num_ranks, self.rows))
        return slices

    def joined(self, slices: Tensor) -> Tensor:
        """Slices ``[P * runs, rows, V]``, by slice, as states ``[runs, H, K, V]``."""
        heads_and_keys = self.task.outgoing.shape[1:3]
        whole = slices.unflatten(0, (len(self.sends), -1)).transpose(0, 1).flatten(1, 2)
        states: Tensor = whole[:, : heads_and_keys.numel()].unflatten(1, heads_and_keys)
        return states

    def scan(self, parts: Tensor) -> Tensor:
        """What runs receive, this rank's slice of it.

        Args:
            parts: this rank's slice of every U ``[sending runs, rows, V]``, by rank, then by slot.

        Returns:
            ``[receiving runs, rows, V]``, by rank, then in the order of the flow.
        """
        flow, (num_heads, key_dim) = self.task.flow, self.task.outgoing.shape[1:3]

        @cache  # runs of one length share a transition
        def own_slice(transition: Tensor) -> Tensor:
            return self.cut(transition.expand(num_heads, key_dim, -1))[flow.rank]

        first = list(accumulate(self.sends, initial=0))
        by_rank: list[list[Tensor]] = [[] for _ in self.receives]
        state = torch.zeros_like(parts[0])
        for step, transition in zip(flow.steps, self.task.transitions):
            if step.receives:
                by_rank[step.rank].append(state)
            if step.sends:
                passed = None if transition is None else own_slice(transition)
                state = advance(parts[first[step.rank] + step.slot], passed, state)
        return torch.stack([state for states in by_rank for state in states])


def _start_sliced(task: Task) -> Finish:
    """Start the first of two all-to-alls: to rank r the r-th slice of every U."""
    outgoing, flow, cp_group = task.outgoing, task.flow, task.cp_group
    num_ranks, value_dim = cp_group.size(), outgoing.shape[3]
    sends, receives = [0] * num_ranks, [0] * num_ranks
    for step in flow.steps:
        sends[step.rank] += step.sends
        receives[step.rank] += step.receives
    slices = _Slices(task, slice_rows(StateSize(*outgoing.shape[1:]), num_ranks), sends, receives)
    num_sends, num_receives = sends[flow.rank], receives[flow.rank]
    by_target = slices.cut(outgoing[:num_sends]).transpose(0, 1).flatten(0, 1).contiguous()
    parts = outgoing.new_empty(sum(sends), slices.rows, value_dim)
    first = dist.all_to_all_single(
        parts, by_target, sends, [num_sends] * num_ranks, group=cp_group, async_op=True
    )

    def finish() -> None:
        first.wait()
        own = outgoing.new_empty(num_ranks * num_receives, slices.rows, value_dim)
        dist.all_to_all_single(
            own, slices.scan(parts), [num_receives] * num_ranks, receives,
            group=cp_group, async_op=True,
        ).wait()  # fmt: skip
        runs = [s.run for s in flow.steps if s.receives and s.rank == flow.rank]
        for run, state in zip(runs, slices.joined(own).unbind()):
            task.incoming[run] = state

    return finish


STRATEGIES: dict[str, Callable[[Task], Finish]] = {
    "all_gather": _start_all_gather,
    "sliced": _start_sliced,
    "scan": start_scan,
    "one_hop": start_scan,  # nothing passes
}
