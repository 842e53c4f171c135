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
- ``sliced``: each rank gets one P-th of the U of all ranks, scans that part for everybody, and
  sends the results back: two all-to-alls, less than two states received a run, whatever P is.
- ``one_hop``: each U goes to the next run only, which is exact where nothing passes through a run,
  or so little that it does not matter. One state received a run, one step.
- ``auto``: ``one_hop`` where it is exact, else ``all_gather`` up to 8 ranks and ``sliced`` above.
- ``serial`` (LASP): states are handed from run to run; each rank waits for its turn before it goes
  on. One state received a run, up to P steps one after the other: the baseline.
  Source: LASP, arXiv:2404.02882.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lasp.flow import Flow

# torch 2.13 renamed it and warns about the old name; torch before that has only the old one.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

Exchange = Literal["auto", "all_gather", "sliced", "one_hop", "serial"]
Wait = Callable[[], Tensor]
Transitions = Sequence[Tensor | None]


def resolve_exchange(
    name: str, flow: Flow, num_ranks: int, rates: Sequence[float], eps: float
) -> str:
    """The strategy of a call, the same on every rank.

    Args:
        name: a key of ``STRATEGIES``, or ``auto``.
        flow: either direction of the layout.
        num_ranks: P.
        rates: decay rates of the heads.
        eps: what has decayed below this need not be sent on.

    Raises:
        ValueError: for an unknown name, an eps that is no share of a state, and for ``one_hop``
            where more would have to pass.
    """
    if name not in ("auto", *STRATEGIES):
        raise ValueError(f"exchange must be one of {('auto', *STRATEGIES)}, got {name!r}")
    if not 0 <= eps < 1:
        raise ValueError(f"state_eps must be in [0, 1), got {eps}: 0 keeps all")
    shortest = flow.shortest_pass
    kept = 0.0 if shortest is None else math.exp(-min(rates) * shortest)
    one_hop = kept == 0 or kept < eps
    if name == "auto":
        return "one_hop" if one_hop else "all_gather" if num_ranks <= 8 else "sliced"
    if name == "one_hop" and not one_hop:
        raise ValueError(
            "exchange must be another than 'one_hop' where states pass through runs: a run of"
            f" {shortest} tokens keeps {kept:.1e} of a state, more than state_eps {eps:.1e}: use"
            " 'auto'"
        )
    return name


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


def _start_sliced(
    outgoing: Tensor, flow: Flow, transitions: Transitions, cp_group: dist.ProcessGroup
) -> Wait:
    """A slice is a range of the H K rows of a state, padded to a multiple of P."""
    num_ranks, (num_heads, key_dim, value_dim) = cp_group.size(), outgoing.shape[1:]
    rows = -(-num_heads * key_dim // num_ranks)
    padding = (0, 0, 0, rows * num_ranks - num_heads * key_dim)
    own_rows = slice(flow.rank * rows, (flow.rank + 1) * rows)
    sends = [sum(hop.sends for hop in flow.hops if hop.rank == r) for r in range(num_ranks)]
    receives = [sum(hop.receives for hop in flow.hops if hop.rank == r) for r in range(num_ranks)]

    padded = F.pad(outgoing[: sends[flow.rank]].flatten(1, 2), padding)
    by_target = padded.unflatten(1, (num_ranks, rows)).transpose(0, 1).flatten(0, 1).contiguous()
    parts = outgoing.new_empty(sum(sends), rows, value_dim)  # by rank, then by slot
    work = dist.all_to_all_single(
        parts, by_target, sends, [sends[flow.rank]] * num_ranks, group=cp_group, async_op=True
    )

    def wait() -> Tensor:
        work.wait()
        first = list(accumulate(sends, initial=0))
        scanned: list[list[Tensor]] = [[] for _ in range(num_ranks)]
        state = torch.zeros_like(parts[0])
        for hop, transition in zip(flow.hops, transitions):
            if hop.receives:
                scanned[hop.rank].append(state)
            if hop.sends:
                if transition is not None:
                    transition = transition.expand(num_heads, key_dim, -1).flatten(0, 1)
                    transition = F.pad(transition, padding)[own_rows]
                state = _advance(parts[first[hop.rank] + hop.slot], transition, state)
        results = torch.stack([state for states in scanned for state in states])
        own = outgoing.new_empty(num_ranks * receives[flow.rank], rows, value_dim)
        dist.all_to_all_single(
            own, results, [receives[flow.rank]] * num_ranks, receives, group=cp_group
        )
        whole = own.unflatten(0, (num_ranks, -1)).transpose(0, 1).flatten(1, 2)
        states = whole[:, : num_heads * key_dim].unflatten(1, (num_heads, key_dim))
        return _placed(states.unbind(), flow, outgoing)

    return wait


def _start_one_hop(
    outgoing: Tensor, flow: Flow, transitions: Transitions, cp_group: dist.ProcessGroup
) -> Wait:
    """One all-to-all of whole states, most parts of which are empty."""
    ranks = range(cp_group.size())
    hops = list(zip(flow.hops, flow.hops[1:]))
    mine = [(after.rank, hop.slot) for hop, after in hops if hop.sends and hop.rank == flow.rank]
    sources = [hop.rank for hop, after in hops if hop.sends and after.rank == flow.rank]
    by_target = torch.cat([outgoing[:0], *(outgoing[slot, None] for _, slot in sorted(mine))])
    received = outgoing.new_empty(len(sources), *outgoing.shape[1:])
    work = dist.all_to_all_single(
        received,
        by_target,
        [sources.count(rank) for rank in ranks],
        [sum(target == rank for target, _ in mine) for rank in ranks],
        group=cp_group,
        async_op=True,
    )

    def wait() -> Tensor:
        work.wait()
        # By source, and from one source in the order of the flow.
        order = sorted(range(len(sources)), key=lambda index: sources[index])
        arrived: list[Tensor] = [outgoing] * len(sources)
        for place, index in enumerate(order):
            arrived[index] = received[place]
        return _placed(arrived, flow, outgoing)

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


def _placed(states: Sequence[Tensor], flow: Flow, outgoing: Tensor) -> Tensor:
    """What the receiving runs of this rank got, in the order of the flow, by index of the run."""
    incoming = outgoing.new_zeros(flow.num_runs, *outgoing.shape[1:])
    runs = (hop.run for hop in flow.hops if hop.receives and hop.rank == flow.rank)
    for run, state in zip(runs, states):
        incoming[run] = state
    return incoming


def _advance(local: Tensor, transition: Tensor | None, received: Tensor) -> Tensor:
    """The state that a run sends on: ``local + transition received``."""
    return local if transition is None else torch.addcmul(local, transition, received)


STRATEGIES: dict[str, Callable[[Tensor, Flow, Transitions, dist.ProcessGroup], Wait]] = {
    "all_gather": _start_all_gather,
    "sliced": _start_sliced,
    "one_hop": _start_one_hop,
    "serial": _start_serial,
}
