"""How the Triton kernels cut a rank's tokens into segments, and the two tensors that tell them.

A segment is a stretch of tokens that one program a head walks chunk by chunk; many segments fill
the GPU when heads are few. Cuts lie where a state must come in or go out: before a fragment that
receives a state or starts from an initial one, after a fragment that sends one or whose final state
is asked for, and around the tail padding. In between, cuts lie where they balance the work,
whatever the documents: those are masks, see ``lasp.lightning.triton.chunk_kernel``.

Example: documents of 3 and 5 tokens on one rank, no states asked for, segments of 4::

    segments   tokens 0:4, nothing comes in      tokens 4:8, carries on document 1
    reach      0 1 2 0                           1 2 3 4
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.cache import ByteCache, kept_in
from lasp._core.host_constants import to_device
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import DirectedFragment, StateFlow, flow_of

FAR = 2**30  # tokens: a head that does not decay


class Segment(NamedTuple):
    """One row of the table that the kernels read; rows of tokens are in the order of the flow.

    Attributes:
        first: the first token, an index into the rank's tokens.
        length: tokens.
        state_length: tokens at its end, of one document, whose state somebody needs; 0 if nobody.
        chain: the first segment that has part in the state that enters; its own index if none
            enters from segments before.
        initial_row: which initial state that document started from, or -1.
        incoming_row: which run received its state, or -1.
        distance: tokens of that document on this rank before the segment.
        final_row: the document that ends here and whose final state is asked for, or -1.
        slot: which sending run ends here, or -1.
        begin: tokens of the rank before it, in the order of the flow.
        sum_row: which row of the sums of chunk_state is its own, or -1 if ``state_length`` is 0.
        state_row: which row of the states of state_passing enters from segments before, or -1.
    """

    first: int
    length: int
    state_length: int
    chain: int
    initial_row: int
    incoming_row: int
    distance: int
    final_row: int
    slot: int
    begin: int
    sum_row: int
    state_row: int


class Plan(NamedTuple):
    """What the kernels must know of one direction on one rank.

    Attributes:
        layout: who holds which tokens.
        flow: where states come from and go to; without fragments, which segments stand for.
        segments: in the order of the flow.
        table: the segments ``[segments, 12]``, int32, on the device.
        summed: the rows of the table whose state somebody needs ``[sums, 12]``, in its order.
        reach: int32 ``[T]``: tokens of its document before each token in the order of the flow; a
            state that enters the document counts as one.
        state_lengths: of the segments.
        num_states: segments that a state enters from segments before.
        num_final: documents whose final state is asked for and that end on this rank.
        shared: whether a document starts inside a segment.
        with_initial: documents start from given states.
    """

    layout: SequenceLayout
    flow: StateFlow
    segments: tuple[Segment, ...]
    table: Tensor
    summed: Tensor
    reach: Tensor
    state_lengths: tuple[int, ...]
    num_states: int
    num_final: int
    shared: bool
    with_initial: bool


class Recurrence(NamedTuple):
    """One direction of a call, but for its tensors of tokens and its states.

    Attributes:
        rates: ``[H]`` float32, on the device.
        reaches: for each head, how many tokens at the end of a segment count.
        plan: the segments.
        scale: of what comes out.
    """

    rates: Tensor
    reaches: tuple[int, ...]
    plan: Plan
    scale: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those that every scan reads."""
        return self.rates, self.plan.table, self.plan.reach


def parts_with_bytes(plan: Plan) -> list[tuple[object, int]]:
    """The plan and what plans of a batch share, each with about its bytes, on the device or not."""
    tensors = plan.reach.nbytes + plan.table.nbytes + plan.summed.nbytes
    return [(plan, tensors + 512 * len(plan.segments)), (plan.layout, plan.layout.host_bytes)]


_PLANS: ByteCache[Plan] = ByteCache(64 * 2**20, lambda _: 0, parts_with_bytes)


@kept_in(_PLANS)
def plan_of(
    layout: SequenceLayout,
    rank: int,
    device: torch.device,
    *,
    reverse: bool,
    with_initial: bool,
    with_final: bool,
    length: int,
) -> Plan:
    """The plan of ``rank``; those of the last batches are kept, because every layer asks.

    Args:
        layout: who holds which tokens.
        rank: this rank.
        device: where the tensors go, without waiting for it.
        reverse: the direction.
        with_initial: documents start from given states.
        with_final: the states that documents leave are asked for.
        length: tokens of a segment, at most.
    """
    flow = flow_of(layout, rank, reverse=reverse)
    spans = _spans(flow, with_initial, with_final)
    segments: list[Segment] = []
    summed: list[Segment] = []
    num_states = 0
    sending = (fragment.offset for fragment in flow.fragments if fragment.sends)
    slots = {offset: slot for slot, offset in enumerate(sending)}
    for span in spans:
        for segment in _cut(span, slots, length, reverse, with_initial, with_final):
            segments.append(_placed(segment, segments, len(summed), num_states))
            num_states += segments[-1].state_row >= 0
            if segment.state_length:
                summed.append(segments[-1])
    in_memory = sorted(flow.fragments, key=lambda fragment: fragment.offset)
    reach = torch.cat([_reach(fragment, reverse, with_initial) for fragment in in_memory])
    edges = {s.first - (s.length - 1 if reverse else 0) for s in segments}
    return Plan(
        layout,
        flow._replace(fragments=()),
        tuple(segments),
        _table(segments, device),
        _table(summed, device),
        to_device(reach, device),
        tuple(segment.state_length for segment in segments),
        num_states,
        sum(segment.final_row >= 0 for segment in segments),
        any(fragment.offset not in edges for fragment in flow.fragments),
        with_initial,
    )


@lru_cache(maxsize=1024)  # one entry a layer
def reaches_of(rates: tuple[float, ...], eps: float) -> tuple[int, ...]:
    """How many tokens back a token's weight in a state is above ``eps``, for each head."""
    exponent = math.log(1 / eps) if eps > 0 else math.inf
    return tuple(
        min(FAR, int(min(exponent / rate, FAR)) + 1) if rate > 0 else FAR for rate in rates
    )


def _spans(
    flow: StateFlow, with_initial: bool, with_final: bool
) -> Iterator[list[DirectedFragment]]:
    """Fragments between two places where a state must come in or go out."""
    span: list[DirectedFragment] = []
    for fragment in flow.fragments:
        if span and (_has_origin(fragment, with_initial) or _is_padding(fragment)):
            yield span
            span = []
        span.append(fragment)
        if fragment.sends or with_final or _is_padding(fragment):
            yield span
            span = []
    if span:
        yield span


def _cut(
    span: list[DirectedFragment],
    slots: dict[int, int],
    length: int,
    reverse: bool,
    with_initial: bool,
    with_final: bool,
) -> Iterator[Segment]:
    """Segments of one span; ``slots`` are those of the fragments that send, by their offset.

    What depends on the segments before is filled in by :func:`_placed`.
    """
    ends = list(accumulate(fragment.length for fragment in span))  # from the start of the span
    total = ends[-1]
    each = -(-total // -(-total // length))
    each = min(length, -(-each // 64) * 64)  # whole chunks, but for the last
    origin = span[0].offset + (span[0].length - 1 if reverse else 0)
    for start in range(0, total, each):
        stop = min(start + each, total)
        at, last_at = bisect_right(ends, start), bisect_left(ends, stop)
        first, last = span[at], span[last_at]
        at_end = stop == ends[last_at]
        own = stop - (ends[last_at] - last.length)
        yield Segment(
            first=origin - start if reverse else origin + start,
            length=stop - start,
            state_length=min(own, stop - start) if last.sends or not at_end else 0,
            chain=-1,
            initial_row=_row(first) if with_initial and not first.receives else -1,
            incoming_row=first.run if first.receives else -1,
            distance=start - (ends[at] - first.length),
            final_row=_row(last) if with_final and at_end and not last.sends else -1,
            slot=slots[last.offset] if at_end and last.sends else -1,
            begin=-1,
            sum_row=-1,
            state_row=-1,
        )


def _placed(segment: Segment, before: list[Segment], num_sums: int, num_states: int) -> Segment:
    """``segment`` with what depends on those before it: how many have sums, how many states."""
    index = len(before)
    begin = before[-1].begin + before[-1].length if before else 0
    chain = index
    if segment.distance > 0:
        whole = before[-1].state_length == before[-1].length
        chain = before[-1].chain if whole else index - 1
    return segment._replace(
        chain=chain,
        begin=begin,
        sum_row=num_sums if segment.state_length else -1,
        state_row=num_states if chain < index else -1,
    )


def _has_origin(fragment: DirectedFragment, with_initial: bool) -> bool:
    return fragment.receives or (with_initial and not _is_padding(fragment))


def _is_padding(fragment: DirectedFragment) -> bool:
    return fragment.document is None


def _row(fragment: DirectedFragment) -> int:
    return -1 if fragment.document is None else fragment.document


def _reach(fragment: DirectedFragment, reverse: bool, with_initial: bool) -> Tensor:
    start = int(_has_origin(fragment, with_initial))
    reach = torch.arange(start, start + fragment.length, dtype=torch.int32, device="cpu")
    return reach.flip(0) if reverse else reach


def _table(segments: list[Segment], device: torch.device) -> Tensor:
    return to_device(torch.tensor(segments, dtype=torch.int32, device="cpu"), device)
