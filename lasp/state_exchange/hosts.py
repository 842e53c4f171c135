"""Two levels: within a host first, then between hosts, ``exchange=host_groups(cp_group, 8)``.

Hops of one host in a row are a segment. A host gathers the U of its ranks over the fast link, so
that each of its ranks knows what reaches its runs from within the segment, and what the segment
sends on. Segments then exchange like runs do, each rank of a host one slice of the state, over the
slow link; a last gather within the host puts the slices together::

    S_in(run) = sum from within the segment + (product of M up to the run) S_in(segment)

A rank receives, in states, (G - 1) slots within the host, then for one G-th of the rows what the
strategy between hosts takes, then (G - 1) / G of what enters its host. Exact, but in another order
of adding: equal to the other strategies to rounding, and to itself in every bit.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lasp.sequence.state_flow import Flow, Hop
from lasp.state_exchange import strategies
from lasp.state_exchange.choice import EXACT
from lasp.state_exchange.cost import (
    NETWORK,
    StateSize,
    exchange_us,
    scan_blocks,
    slice_rows,
    traffic_of,
)
from lasp.state_exchange.task import Finish, HostGroups, Task, Transitions, advance


def host_groups(
    cp_group: dist.ProcessGroup, ranks_per_host: int, *, timeout: timedelta | None = None
) -> HostGroups:
    """Make the groups; every rank of ``cp_group`` must call it, once for all calls.

    Args:
        cp_group: its ranks r with the same ``r // ranks_per_host`` share a host.
        ranks_per_host: G, must divide the size of the group.
        timeout: of the new groups, which have the backend of ``cp_group``; by default torch's.

    Raises:
        ValueError: if it does not.
    """
    if ranks_per_host < 1 or cp_group.size() % ranks_per_host:
        raise ValueError(
            f"ranks_per_host must divide the {cp_group.size()} ranks of cp_group, got"
            f" {ranks_per_host}: pass the ranks that share a host, as many on each, or use another"
            " exchange"
        )
    levels = _levels(cp_group, ranks_per_host)
    backend = dist.get_backend(cp_group)
    inner, outer = (
        dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
        for ranks in levels
    )
    return HostGroups(inner, outer)


def check_hosts(hosts: HostGroups, cp_group: dist.ProcessGroup) -> None:
    """Raise ValueError unless the groups are those of ``cp_group`` on every rank."""
    actual = tuple(dist.get_process_group_ranks(group) for group in hosts)
    if cp_group.size() % len(actual[0]) or actual != _levels(cp_group, len(actual[0])):
        raise ValueError(
            f"exchange must be the host groups of cp_group, got ranks {actual[0]} within and"
            f" {actual[1]} between hosts: use host_groups(cp_group, ranks_per_host)"
        )


def _levels(cp_group: dist.ProcessGroup, ranks_per_host: int) -> tuple[list[int], list[int]]:
    """Global ranks of the host of this rank, and of its place on every host."""
    ranks = dist.get_process_group_ranks(cp_group)
    host, place = divmod(cp_group.rank(), ranks_per_host)
    start = host * ranks_per_host
    return ranks[start : start + ranks_per_host], ranks[place::ranks_per_host]


class _Segment(NamedTuple):
    """Hops ``first`` to ``stop`` of one host."""

    first: int
    stop: int


class _Level(NamedTuple):
    """The flow of segments between hosts, and the segments of this host."""

    flow: Flow
    transitions: Transitions
    own: list[_Segment]


def start_two_level(task: Task, hosts: HostGroups) -> Finish:
    """Start the gather within the host."""
    gathered = task.outgoing.new_empty(hosts.inner.size(), *task.outgoing.shape)
    work = strategies.all_gather(
        gathered.flatten(0, 1), task.outgoing, group=hosts.inner, async_op=True
    )
    level = _between_hosts(task, hosts)

    def finish() -> None:
        work.wait()
        if level.flow.num_slots == 0:  # nothing crosses between hosts
            for segment in level.own:
                _walk(task, hosts, segment, gathered, None)
            return
        entering = _exchange_segments(task, hosts, level, gathered)
        for segment, state in zip(level.own, entering):
            _walk(task, hosts, segment, gathered, state)

    return finish


def _between_hosts(task: Task, hosts: HostGroups) -> _Level:
    hops, per_host = task.flow.hops, hosts.inner.size()
    own_host, num_hosts = task.flow.rank // per_host, hosts.outer.size()

    @cache  # most segments hold the same transitions
    def product(transitions: tuple[Tensor | None, ...]) -> Tensor | None:
        result: Tensor | None = None
        for transition in transitions:
            if transition is None:
                return None
            result = transition if result is None else result * transition
        return result

    segments, coarse, own = [0] * num_hosts, [], []
    slots = [0] * num_hosts
    passed: list[Tensor | None] = []
    for host, indices in groupby(range(len(hops)), key=lambda j: hops[j].rank // per_host):
        some = list(indices)
        first, stop = some[0], some[-1] + 1
        transition = product(tuple(task.transitions[first:stop]))
        passed.append(transition)
        coarse.append(
            Hop(
                rank=host,
                run=segments[host],
                length=sum(hop.length for hop in hops[first:stop]),
                receives=hops[first].receives,
                sends=hops[stop - 1].sends,
                passes=transition is not None,
                slot=slots[host],
            )
        )
        segments[host] += 1
        slots[host] += coarse[-1].sends
        if host == own_host:
            own.append(_Segment(first, stop))
    flow = task.flow._replace(
        rank=own_host, hops=tuple(coarse), pieces=(), num_runs=len(own), num_slots=max(slots)
    )
    return _Level(flow, passed, own)


def _walk(
    task: Task, hosts: HostGroups, segment: _Segment, gathered: Tensor, entering: Tensor | None
) -> Tensor | None:
    """Fill in what the runs of this rank in a segment receive; what the segment itself sends on.

    Without ``entering``, the state that enters the segment, only what comes from within counts.
    """
    state = entering
    for j in range(segment.first, segment.stop):
        hop, transition = task.flow.hops[j], task.transitions[j]
        if hop.receives and hop.rank == task.flow.rank and state is not None:
            task.incoming[hop.run] = state
        if not hop.sends:
            state = None
            continue
        local = gathered[hop.rank % hosts.inner.size(), hop.slot]
        state = local if state is None else advance(local, transition, state)
    return state


def _exchange_segments(task: Task, hosts: HostGroups, level: _Level, gathered: Tensor) -> Tensor:
    """What enters each segment of this host ``[segments, H, K, V]``, by slices of the rows."""
    num_heads, key_dim, value_dim = task.outgoing.shape[1:]
    num_parts, place = hosts.inner.size(), hosts.inner.rank()
    rows = slice_rows(StateSize(num_heads, key_dim, value_dim), num_parts)
    padding = (0, 0, 0, rows * num_parts - num_heads * key_dim)

    @cache  # segments share transitions
    def sliced(x: Tensor) -> Tensor:
        whole = x.expand(num_heads, key_dim, -1).flatten(0, 1)
        return F.pad(whole, padding)[place * rows : (place + 1) * rows].unsqueeze(0)

    outgoing = task.outgoing.new_zeros(level.flow.num_slots, 1, rows, value_dim)
    sending = [s for s in level.own if task.flow.hops[s.stop - 1].sends]
    for slot, segment in enumerate(sending):
        total = _walk(task, hosts, segment, gathered, None)
        if total is not None:
            outgoing[slot] = sliced(total)
    incoming = task.outgoing.new_zeros(len(level.own), 1, rows, value_dim)
    transitions = [None if passed is None else sliced(passed) for passed in level.transitions]

    traffic = traffic_of(level.flow.hops, hosts.outer.size(), lambda length: True)
    size = StateSize(1, rows, value_dim, incoming.element_size())
    blocks = scan_blocks(traffic, size, NETWORK)
    name = min(EXACT, key=lambda name: exchange_us(name, traffic, size, NETWORK, blocks))
    between = Task(incoming, outgoing, level.flow, transitions, hosts.outer, blocks)
    strategies.STRATEGIES[name](between)()

    parts = incoming.new_empty(num_parts, *incoming.shape)
    strategies.all_gather(parts.flatten(0, 1), incoming, group=hosts.inner, async_op=True).wait()
    whole = parts.squeeze(2).transpose(0, 1).flatten(1, 2)[:, : num_heads * key_dim]
    entering: Tensor = whole.unflatten(1, (num_heads, key_dim))
    return entering
