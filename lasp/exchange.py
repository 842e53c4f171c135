"""How states cross rank borders: one interface, one strategy a name.

Run j of the flow sends on ``S_j = U_j + M_j S_{j-1}``: its own part U_j (pass A of ``lasp.ops``)
plus what it received, moved through by the transition M_j. That affine pair is all that crosses
ranks. For lightning attention M_j = lambda^length, one number a head; only :func:`_advance` knows
how a transition acts, so a data-dependent or matrix-valued one changes nothing else.

A strategy starts the exchange and returns a function that waits for it and gives the states which
this rank's runs receive. All strategies add in the order of the flow: same bits from each, run to
run. Volumes are for one direction, with state = H K V 4 bytes (8 in fp64):

- ``all_gather`` (LASP+): each rank gathers the U of all ranks in one collective, in the background,
  and combines those before its own runs. (P - 1) slots states received; one step whatever P is.
  Source: MiniMax-01, arXiv:2501.08313; LASP-2, arXiv:2502.07563.
- ``serial`` (LASP): states are handed from run to run; each rank waits for its turn before it goes
  on. One state received a run, up to P steps one after the other: the baseline.
  Source: LASP, arXiv:2404.02882.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.flow import Flow

# torch 2.13 renamed it and warns about the old name; torch before that has only the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

Wait = Callable[[], Tensor]
Transitions = Sequence[Tensor | None]


def start_exchange(
    name: str,
    outgoing: Tensor,
    flow: Flow,
    transitions: Transitions,
    cp_group: dist.ProcessGroup | None,
) -> Wait:
    """Start to send the local states on; the returned function waits for those that come in.

    Args:
        name: a key of ``STRATEGIES``.
        outgoing: U of this rank's sending runs ``[flow.num_slots, H, K, V]``.
        flow: who sends to whom.
        transitions: for each hop M, broadcastable to ``[H, K, V]``; None where nothing passes.
        cp_group: the ranks of the layout; may be None where no state crosses a border.

    Returns:
        A function to be called once, which returns the incoming states
        ``[flow.num_runs, H, K, V]``, zero for a run that receives nothing.

    Communication: none if no document is cut by a border of runs; else that of the strategy.
    """
    if cp_group is None or flow.num_slots == 0:
        return lambda: outgoing.new_zeros(flow.num_runs, *outgoing.shape[1:])
    return STRATEGIES[name](outgoing, flow, transitions, cp_group)


def _start_all_gather(
    outgoing: Tensor, flow: Flow, transitions: Transitions, cp_group: dist.ProcessGroup
) -> Wait:
    gathered = outgoing.new_empty(cp_group.size(), *outgoing.shape)
    work = _all_gather(gathered.flatten(0, 1), outgoing, group=cp_group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        incoming = outgoing.new_zeros(flow.num_runs, *outgoing.shape[1:])
        left = sum(hop.receives for hop in flow.hops if hop.rank == flow.rank)
        state = outgoing.new_zeros(outgoing.shape[1:])
        for hop, transition in zip(flow.hops, transitions):
            if left == 0:
                break
            if hop.receives and hop.rank == flow.rank:
                incoming[hop.run] = state
                left -= 1
            if hop.sends:
                state = _advance(gathered[hop.rank, hop.slot], transition, state)
        return incoming

    return wait


def _start_serial(
    outgoing: Tensor, flow: Flow, transitions: Transitions, cp_group: dist.ProcessGroup
) -> Wait:
    incoming = outgoing.new_zeros(flow.num_runs, *outgoing.shape[1:])
    state = outgoing.new_zeros(outgoing.shape[1:])
    for j, (hop, transition) in enumerate(zip(flow.hops, transitions)):
        if hop.rank != flow.rank:
            continue
        if hop.receives:
            source = flow.hops[j - 1].rank
            if source != flow.rank:
                state = torch.empty_like(state)
                dist.recv(state, group=cp_group, group_src=source)
            incoming[hop.run] = state
        if hop.sends:
            state = _advance(outgoing[hop.slot], transition, state)
            target = flow.hops[j + 1].rank
            if target != flow.rank:
                dist.send(state, group=cp_group, group_dst=target)
    return lambda: incoming


def _advance(local: Tensor, transition: Tensor | None, received: Tensor) -> Tensor:
    """The state that a run sends on: ``local + transition received``."""
    return local if transition is None else torch.addcmul(local, transition, received)


STRATEGIES: dict[str, Callable[[Tensor, Flow, Transitions, dist.ProcessGroup], Wait]] = {
    "all_gather": _start_all_gather,
    "serial": _start_serial,
}
