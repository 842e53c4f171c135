"""What starts an exchange: in the background, each choice on its heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.failure import naming
from lasp._core.host_constants import to_device
from lasp.sequence.state_flow import StateFlow
from lasp.state_exchange.choice import ExchangeChoice
from lasp.state_exchange.strategies import STRATEGIES
from lasp.state_exchange.task import Finish, Task, Transitions

Wait = Callable[[], Tensor]


def start_exchange(
    choices: Sequence[ExchangeChoice],
    outgoing: Tensor,
    flow: StateFlow,
    transitions: Sequence[Transitions],
    cp_group: dist.ProcessGroup | None,
) -> Wait:
    """Start to send the local states on; the returned function waits for those that come in.

    Args:
        choices: strategies, for different heads; those of no strategy are not sent.
        outgoing: U of this rank's sending runs ``[flow.num_slots, H, K, V]``.
        flow: who sends to whom.
        transitions: for each choice and each run step M, broadcastable to ``[heads, K, V]``; None
            where nothing passes.
        cp_group: the ranks of the layout; may be None where no state crosses a border.

    Returns:
        A function to be called once, which returns the incoming states
        ``[flow.num_runs, H, K, V]``, zero for a run that receives nothing. On a GPU it makes the
        current stream wait, not the host.

    Communication: none if no document is cut by a border of runs; else that of the strategies.

    Raises:
        ExchangeError: here or in the returned function, if a rank is gone or does not come within
            the timeout of the group, see ``lasp._core.failure``.
    """
    incoming = _nothing_yet(choices, outgoing, flow)
    if cp_group is None or flow.num_slots == 0:
        return lambda: incoming
    group = cp_group

    def start_all() -> list[Finish]:
        return [
            _start_choice(choice, incoming, outgoing, flow, passed, group)
            for choice, passed in zip(choices, transitions)
        ]

    # A one hop is one collective, which runs in the background without a stream of ours.
    if outgoing.is_cuda and any(choice.strategy != "one_hop" for choice in choices):
        return _on_side_stream(start_all, incoming, outgoing)
    finishes = start_all()

    def finish_all() -> Tensor:
        for finish in finishes:
            finish()
        return incoming

    return finish_all


def _nothing_yet(choices: Sequence[ExchangeChoice], outgoing: Tensor, flow: StateFlow) -> Tensor:
    """Incoming states, zero unless all of them will be written."""
    shape = (flow.num_runs, *outgoing.shape[1:])
    receiving = sum(step.receives for step in flow.steps if step.rank == flow.rank)
    whole = receiving == flow.num_runs and any(len(c.heads) == shape[1] for c in choices)
    return outgoing.new_empty(shape) if whole else outgoing.new_zeros(shape)


def _on_side_stream(
    start_all: Callable[[], list[Finish]], incoming: Tensor, outgoing: Tensor
) -> Wait:
    """Queue all of it.

    Both tensors were made on the main stream and are held until that has waited, so that their
    memory cannot go to others while the side stream uses it.
    """
    side = _side_stream(outgoing.device)
    side.wait_stream(torch.cuda.current_stream(outgoing.device))
    with torch.cuda.stream(side):
        for finish in start_all():
            finish()
    done = side.record_event()

    def wait(_held: Tensor = outgoing) -> Tensor:
        torch.cuda.current_stream(incoming.device).wait_event(done)
        return incoming

    return wait


def _start_choice(
    choice: ExchangeChoice,
    incoming: Tensor,
    outgoing: Tensor,
    flow: StateFlow,
    transitions: Transitions,
    cp_group: dist.ProcessGroup,
) -> Finish:
    """Start one strategy on its heads, which become a tensor of their own if they are not all."""
    own, part = outgoing, incoming
    heads: slice | Tensor = slice(None)
    if len(choice.heads) < outgoing.shape[1]:
        heads = _index(choice.heads, outgoing.device)
        own = outgoing[:, heads].contiguous()
        part = own.new_zeros(flow.num_runs, *own.shape[1:])
    task = Task(part, own, flow, transitions, cp_group, choice.num_blocks)
    what = f"state exchange {choice.strategy!r}"
    with naming(what, cp_group):
        finish = STRATEGIES[choice.strategy](task)

    def place() -> None:
        with naming(what, cp_group):
            finish()
        if part is not incoming:
            incoming[:, heads] = part

    return place


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of high priority: it computes little, and others wait for it."""
    return torch.cuda.Stream(device, priority=-1)


@tensor_cache(maxsize=1024)
def _index(heads: tuple[int, ...], device: torch.device) -> slice | Tensor:
    first, last = heads[0], heads[-1]
    if last - first + 1 == len(heads):
        return slice(first, last + 1)
    with torch.inference_mode(False):
        return to_device(torch.tensor(heads, device="cpu"), device)
