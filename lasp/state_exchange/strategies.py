"""The strategies: each starts on a task and returns what finishes it.

Collectives are asynchronous even where they are waited for at once: with NCCL they then run on the
stream of the group, in one order with those of others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lasp.state_exchange.cost import StateSize, slice_rows
from lasp.state_exchange.scan import start_scan
from lasp.state_exchange.task import Finish, Task, advance

# torch 2.13 renamed it and warns about the old name; torch before that has only the old one.
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def _start_all_gather(task: Task) -> Finish:
    outgoing, flow = task.outgoing, task.flow
    gathered = outgoing.new_empty(task.cp_group.size(), *outgoing.shape)
    work = all_gather(gathered.flatten(0, 1), outgoing, group=task.cp_group, async_op=True)

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


def _start_sliced(task: Task) -> Finish:
    """A slice is a range of the H K rows of a state, padded to a multiple of P."""
    outgoing, flow, cp_group = task.outgoing, task.flow, task.cp_group
    num_ranks, (num_heads, key_dim, value_dim) = cp_group.size(), outgoing.shape[1:]
    rows = slice_rows(StateSize(num_heads, key_dim, value_dim), num_ranks)
    padding = (0, 0, 0, rows * num_ranks - num_heads * key_dim)
    own_rows = slice(flow.rank * rows, (flow.rank + 1) * rows)
    sends = [sum(step.sends for step in flow.steps if step.rank == r) for r in range(num_ranks)]
    receives = [
        sum(step.receives for step in flow.steps if step.rank == r) for r in range(num_ranks)
    ]

    padded = F.pad(outgoing[: sends[flow.rank]].flatten(1, 2), padding)
    by_target = padded.unflatten(1, (num_ranks, rows)).transpose(0, 1).flatten(0, 1).contiguous()
    parts = outgoing.new_empty(sum(sends), rows, value_dim)  # by rank, then by slot
    work = dist.all_to_all_single(
        parts, by_target, sends, [sends[flow.rank]] * num_ranks, group=cp_group, async_op=True
    )

    @cache  # runs of one length share a transition
    def rows_of(transition: Tensor) -> Tensor:
        whole = transition.expand(num_heads, key_dim, -1).flatten(0, 1)
        return F.pad(whole, padding)[own_rows]

    def scanned() -> Tensor:
        first = list(accumulate(sends, initial=0))
        by_rank: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        state = torch.zeros_like(parts[0])
        for step, transition in zip(flow.steps, task.transitions):
            if step.receives:
                by_rank[step.rank].append(state)
            if step.sends:
                if transition is not None:
                    transition = rows_of(transition)
                state = advance(parts[first[step.rank] + step.slot], transition, state)
        return torch.stack([state for states in by_rank for state in states])

    def finish() -> None:
        work.wait()
        own = outgoing.new_empty(num_ranks * receives[flow.rank], rows, value_dim)
        dist.all_to_all_single(
            own,
            scanned(),
            [receives[flow.rank]] * num_ranks,
            receives,
            group=cp_group,
            async_op=True,
        ).wait()
        whole = own.unflatten(0, (num_ranks, -1)).transpose(0, 1).flatten(1, 2)
        states = whole[:, : num_heads * key_dim].unflatten(1, (num_heads, key_dim))
        runs = (step.run for step in flow.steps if step.receives and step.rank == flow.rank)
        for run, state in zip(runs, states.unbind()):
            task.incoming[run] = state

    return finish


STRATEGIES: dict[str, Callable[[Task], Finish]] = {
    "all_gather": _start_all_gather,
    "sliced": _start_sliced,
    "scan": start_scan,
    "one_hop": start_scan,  # nothing passes
}
