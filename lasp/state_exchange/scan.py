"""The pipelined chain: states go from run to run in blocks, ``scan`` and ``one_hop``.

Step t carries block b of every state that has come through d runs, for all b + d = t::

    3 ranks, one document, 2 blocks      step 0           step 1           step 2
    rank 0 -> 1                          block 0          block 1
    rank 1 -> 2                                           block 0          block 1

A block is a range of columns of the state: M S = (M S_0, M S_1, ...) holds for any M that acts on
rows. Each step is one all-to-all, most parts of which are empty. So every rank takes part in every
step, on the communicator of the group, and no order of sends and receives can wait in a circle.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.state_exchange.cost import depths
from lasp.state_exchange.task import Finish, Task, advance


class ScanMessage(NamedTuple):
    """Some columns of the state that run step number ``run_step`` sends to the one after it."""

    source: int
    target: int
    run_step: int
    columns: slice


class ScanStep(NamedTuple):
    """A step on its way: what arrives, one message after the other, and where it belongs."""

    work: dist.Work
    arriving: Tensor
    targets: list[Tensor]


def start_scan(task: Task) -> Finish:
    """Start the chain; where nothing passes it is the one hop."""
    reached = depths(task.flow.steps, [passed is not None for passed in task.transitions])
    num_steps = max(reached) + task.num_blocks
    first = _start_step(task, reached, 0)

    def finish() -> None:
        step = first
        for index in range(1, num_steps + 1):
            _place(step)
            if index < num_steps:
                step = _start_step(task, reached, index)

    return finish


def _start_step(task: Task, reached: list[int], index: int) -> ScanStep:
    """Messages between two ranks go in the order of the flow."""
    messages = _messages(task, reached, index)
    rank = task.flow.rank
    sent = sorted((m for m in messages if m.source == rank), key=lambda m: m.target)
    expected = sorted((m for m in messages if m.target == rank), key=lambda m: m.source)
    rows = task.outgoing[0, ..., 0].numel()

    def elements(some: list[ScanMessage]) -> int:
        return sum(rows * (m.columns.stop - m.columns.start) for m in some)

    ranks = range(task.cp_group.size())
    # A state alone leaves from where it is and arrives where it belongs, without a copy.
    blocks = [_block(task, m) for m in sent]
    departing = blocks[0].contiguous().view(-1) if len(blocks) == 1 else _joined(task, blocks)
    targets = [_target(task, m) for m in expected]
    if len(targets) == 1 and targets[0].is_contiguous():
        arriving = targets.pop().view(-1)
    else:
        arriving = task.outgoing.new_empty(elements(expected))
    work = dist.all_to_all_single(
        arriving,
        departing,
        [elements([m for m in expected if m.source == source]) for source in ranks],
        [elements([m for m in sent if m.target == target]) for target in ranks],
        group=task.cp_group,
        async_op=True,
    )
    return ScanStep(work, arriving, targets)


def _messages(task: Task, reached: list[int], step: int) -> list[ScanMessage]:
    """Those of one step that this rank sends or receives, in the order of the flow."""
    run_steps, rank, width = task.flow.steps, task.flow.rank, task.outgoing.shape[-1]
    cuts = [width * block // task.num_blocks for block in range(task.num_blocks + 1)]
    blocks = [slice(*cut) for cut in pairwise(cuts)]
    return [
        ScanMessage(run_step.rank, after.rank, j, blocks[step - depth])
        for j, (run_step, after, depth) in enumerate(zip(run_steps, run_steps[1:], reached))
        if depth >= 0 and 0 <= step - depth < len(blocks) and rank in (run_step.rank, after.rank)
    ]


def _block(task: Task, message: ScanMessage) -> Tensor:
    run_step, columns = task.flow.steps[message.run_step], message.columns
    transition = task.transitions[message.run_step]
    if transition is not None and transition.shape[-1] > 1:
        transition = transition[..., columns]
    received = task.incoming[run_step.run, ..., columns]
    return advance(task.outgoing[run_step.slot, ..., columns], transition, received)


def _joined(task: Task, blocks: list[Tensor]) -> Tensor:
    return torch.cat([task.outgoing.new_empty(0), *(block.flatten() for block in blocks)])


def _target(task: Task, message: ScanMessage) -> Tensor:
    return task.incoming[task.flow.steps[message.run_step + 1].run, ..., message.columns]


def _place(step: ScanStep) -> None:
    step.work.wait()
    start = 0
    for target in step.targets:
        target.copy_(step.arriving[start : start + target.numel()].view(target.shape))
        start += target.numel()
