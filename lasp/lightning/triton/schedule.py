"""``lightning_attention(impl="triton")``: the schedule of the kernels.

The same passes as the eager function in ``lasp.lightning.attention``, but in the forward pass the
output waits for the exchange and starts from the received states: a second pass over the output, to
add their part, would cost more than the exchange it hides. The backward hides the exchange of
gradients under dq, which needs only states of the forward pass.

What a direction does is planned once for each layout, rates, shapes, strides and settings: checks,
segments, tables, sizes and compiled kernels. A call looks its plan up, makes the results and
launches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.cache import ByteCache
from lasp._core.host_constants import to_device
from lasp._core.launcher import aligned
from lasp.lightning.decay import rates_by_value
from lasp.lightning.op_context import (
    OpContext,
    Settings,
    heads_of_rows,
    rows_of_heads,
    states_of_heads,
    states_of_rows,
    transitions_of,
)
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan import ChunkScan, EdgeStates, KeyValueGradients
from lasp.lightning.triton.chunk_state import ChunkState, segment_length
from lasp.lightning.triton.segments import Plan, Recurrence, parts_with_bytes, plan_of, reaches_of
from lasp.lightning.validation import checked_context
from lasp.state_exchange import Transitions, start_exchange


class _Sending(NamedTuple):
    """The exchange of one direction, and the states that documents leave.

    Attributes:
        op: the call, without its group.
        plan: the segments.
        passed: what run steps pass on, for each choice of the exchange.
        empty: int64 ``[documents]``: those without a token whose states this rank keeps; None if
            there are none.
        shape: of the final states ``(N, H, K, V)``.
    """

    op: OpContext
    plan: Plan
    passed: list[Transitions]
    empty: Tensor | None
    shape: tuple[int, int, int, int]

    def start(
        self, outgoing: Tensor, cp_group: dist.ProcessGroup | None
    ) -> Callable[[], Tensor | None]:
        """Start to send; what is returned waits for what comes in: None if no document is cut."""
        flow = self.plan.flow
        if flow.num_slots == 0:
            return lambda: None
        wait = start_exchange(self.op.exchange, outgoing, flow, self.passed, cp_group)
        return lambda: aligned(wait().contiguous())

    def final_states(self, initial_state: Tensor | None) -> Tensor:
        """To be filled in: zero for documents that end elsewhere, as they were for empty ones."""
        device = self.plan.table.device
        if self.plan.num_final == self.shape[0]:
            return torch.empty(self.shape, dtype=torch.float32, device=device)
        states = torch.zeros(self.shape, dtype=torch.float32, device=device)
        if initial_state is not None and self.empty is not None:
            states[self.empty] = initial_state[self.empty]
        return states


class _Forward(NamedTuple):
    segments: tuple[Plan, ...]
    sending: _Sending
    chunk_state: ChunkState
    chunk_scan: ChunkScan


class _Backward(NamedTuple):
    segments: tuple[Plan, ...]  # of both directions
    sending: _Sending
    chunk_state: ChunkState
    query_gradient: ChunkScan
    key_value_gradients: KeyValueGradients


def forward(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial_state: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final states, and what the backward needs of states; empty where there is none."""
    like = q
    key = _key(q, rates, initial_state, settings)
    q, k, v = (_rows(x) for x in (q, k, v))

    def build() -> _Forward:
        op = _context(like, v, rates, initial_state, settings)
        return _plan_forward(op, q, k, v, initial_state is not None)

    plan = _FORWARD.get((*key, q.stride(), k.stride(), v.shape, v.stride()), build)
    initial_state = _states(initial_state, like)
    states, outgoing = plan.chunk_state(k, v, initial_state)
    incoming = plan.sending.start(outgoing, settings.cp_group)()
    final_state = None
    if settings.output_final_state:
        final_state = plan.sending.final_states(initial_state)
    output = plan.chunk_scan(q, k, v, EdgeStates(states, initial_state, incoming, final_state))
    return (
        rows_of_heads(output, like),
        states.new_empty(0) if final_state is None else states_of_rows(final_state, like),
        states if states.numel() else states.new_empty(0),  # which others share
        states.new_empty(0) if incoming is None else incoming.view(-1),
    )


def backward(
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    initial_state: Tensor | None,
    states: Tensor,
    incoming: Tensor,
    needs_initial: bool,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; the latter empty if not asked for."""
    like = q
    key = _key(q, rates, initial_state, settings)
    if grad_output is None:  # only the final state was used, on this rank
        grad_output = torch.zeros_like(v)
    q, k, v, do = (_rows(x) for x in (q, k, v, grad_output))
    asked = (grad_final is not None, needs_initial)

    def build() -> _Backward:
        op = _context(like, v, rates, initial_state, settings)
        return _plan_backward(op, (q, k, v, do), initial_state is not None, asked)

    strides = q.stride(), k.stride(), v.stride(), do.stride()
    plan = _BACKWARD.get((*key, *asked, v.shape, *strides), build)
    initial_state, grad_final = _states(initial_state, like), _states(grad_final, like)
    received = aligned(incoming) if incoming.numel() else None
    states_back, outgoing = plan.chunk_state(q, do, grad_final)
    wait = plan.sending.start(outgoing, settings.cp_group)
    edges = EdgeStates(aligned(states), initial_state, received)
    dq = plan.query_gradient(do, v, k, edges)
    grad_initial = plan.sending.final_states(grad_final) if needs_initial else None
    edges = EdgeStates(states_back, grad_final, wait(), grad_initial)
    dk, dv = plan.key_value_gradients(q, k, v, do, edges)
    return (
        rows_of_heads(dq, like),
        rows_of_heads(dk, like),
        rows_of_heads(dv, like),
        states.new_empty(0) if grad_initial is None else states_of_rows(grad_initial, like),
    )


# ---- plans --------------------------------------------------------------------------------------


def _key(
    q: Tensor, rates: Tensor, initial_state: Tensor | None, settings: Settings
) -> tuple[Hashable, ...]:
    """What the plans of both directions follow from, but for V and strides; K is that of q.

    The functions that choose sizes are part of it: tests and tuners put others in their place.
    """
    layout, group, *numbers = settings
    ranks = None if group is None else (group.rank(), group.size())
    initial = None if initial_state is None else (initial_state.shape, initial_state.dtype)
    return (
        layout, ranks, *numbers, tuple(rates.tolist()), q.shape, q.dtype, q.device, initial,
        tuning.output_blocks, tuning.hopper_blocks, tuning.state_blocks, tuning.segment_length,
        tuning.part_length, tuning.combine_blocks, tuning.waits_for_memory,
    )  # fmt: skip


def _context(
    q: Tensor, v: Tensor, rates: Tensor, initial_state: Tensor | None, settings: Settings
) -> OpContext:
    """The checked call; without its group, which plans are not to keep alive."""
    return checked_context(q, v, rates, initial_state, settings)._replace(cp_group=None)


def _plan_forward(op: OpContext, q: Tensor, k: Tensor, v: Tensor, with_initial: bool) -> _Forward:
    recurrence = _recurrence(op, q, v, with_initial)
    chunk_state = ChunkState(k, v, recurrence._replace(scale=1.0))
    chunk_scan = ChunkScan(q, k, v, recurrence, with_final=op.with_final_state)
    sending = _sending(op, recurrence, q, v)
    return _Forward((recurrence.plan,), sending, chunk_state, chunk_scan)


def _plan_backward(
    op: OpContext,
    examples: tuple[Tensor, Tensor, Tensor, Tensor],
    with_initial: bool,
    asked: tuple[bool, bool],
) -> _Backward:
    """Asked: whether final states have gradients, and whether initial states are to have some."""
    q, k, v, do = examples
    with_final_gradient, needs_initial = asked
    forward = _recurrence(op, q, v, with_initial)
    back = _recurrence(op, q, v, with_final_gradient, reverse=True, with_final=needs_initial)
    return _Backward(
        (forward.plan, back.plan),
        _sending(op, back, q, v),
        ChunkState(q, do, back),
        ChunkScan(do, v, k, forward, transposed=True),
        KeyValueGradients(q, k, v, do, back, with_final=needs_initial),
    )


def _recurrence(
    op: OpContext,
    q: Tensor,
    v: Tensor,
    with_initial: bool,
    *,
    reverse: bool = False,
    with_final: bool = False,
) -> Recurrence:
    reaches = reaches_of(op.rates, op.state_eps)
    plan = plan_of(
        op.layout, op.rank, q.device, reverse=reverse, with_initial=with_initial,
        with_final=with_final if reverse else op.with_final_state,
        length=segment_length(q, v, reaches),
    )  # fmt: skip
    return Recurrence(rates_by_value(op.rates, q.device, torch.float32), reaches, plan, op.scale)


def _sending(op: OpContext, recurrence: Recurrence, q: Tensor, v: Tensor) -> _Sending:
    flow = recurrence.plan.flow
    empty = None
    if flow.empty_documents:
        empty = torch.tensor(flow.empty_documents, dtype=torch.int64, device="cpu")
        empty = to_device(empty, q.device)
    return _Sending(
        op,
        recurrence.plan,
        transitions_of(op, flow, torch.float32, q.device) if flow.num_slots else [],
        empty,
        (flow.num_documents, q.shape[1], q.shape[2], v.shape[2]),
    )


def _segments(plan: _Forward | _Backward) -> list[tuple[object, int]]:
    """What the layers of a batch share, with its bytes."""
    return [part for segments in plan.segments for part in parts_with_bytes(segments)]


# One for each layer and batch in flight, of about 16 KiB besides its segments.
_FORWARD: ByteCache[_Forward] = ByteCache(64 * 2**20, lambda _: 16 * 2**10, _segments)
_BACKWARD: ByteCache[_Backward] = ByteCache(64 * 2**20, lambda _: 16 * 2**10, _segments)


# ---- tensors ------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides of tokens and heads, but rows of a head lie in one piece."""
    x = heads_of_rows(x)
    return aligned(x if x.stride(2) == 1 else x.contiguous())


def _states(states: Tensor | None, q: Tensor) -> Tensor | None:
    return None if states is None else aligned(states_of_heads(states, q).contiguous())
