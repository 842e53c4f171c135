"""``lightning_attention(impl="triton")``: the schedule of the kernels.

The same passes as the eager function in ``lasp.lightning.attention``, but in the forward pass the
output waits for the exchange and starts from the received states: a second pass over the output, to
add their part, would cost more than the exchange it hides. The backward hides the exchange of
gradients under dq, which needs only states of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lasp.lightning.decay import rates_by_value
from lasp.lightning.op_context import (
    OpContext,
    heads_of_rows,
    rows_of_heads,
    start,
    states_of_heads,
    states_of_rows,
)
from lasp.lightning.triton.chunk_scan import EdgeStates, chunk_scan, key_value_gradients
from lasp.lightning.triton.chunk_state import chunk_state, segment_length
from lasp.lightning.triton.segments import Plan, plan_of, reaches_of
from lasp.sequence.state_flow import StateFlow


def forward(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, op: OpContext
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final states, and what the backward needs of states; empty where there is none."""
    like, rates = q, _rates(op, q)
    q, k, v = (_rows(x) for x in (q, k, v))
    initial_state = _states(initial_state, like)
    plan = _plan(op, q, v, initial_state is not None)
    states, outgoing = chunk_state(
        k,
        v,
        rates,
        plan,
        reaches_of(op.rates, op.state_eps),
        initial_state=initial_state,
        scale=1.0,
    )
    incoming = _start(outgoing, rates, plan.flow, op)()
    final_state = None
    if op.with_final_state:
        final_state = _final_states(
            q, v, plan.flow.num_documents, initial_state, plan.flow.empty_documents
        )
    edges = EdgeStates(states, initial_state, incoming, final_state)
    output = chunk_scan(q, k, v, rates, plan, edges, scale=op.scale)
    return (
        rows_of_heads(output, like),
        states.new_empty(0) if final_state is None else states_of_rows(final_state, like),
        states.view(-1),
        states.new_empty(0) if incoming is None else incoming.view(-1),
    )


def backward(
    grad_output: Tensor | None,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    states: Tensor,
    incoming: Tensor,
    needs_initial: bool,
    op: OpContext,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; the latter empty if not asked for."""
    like, rates = q, _rates(op, q)
    if grad_output is None:  # only the final state was used, on this rank
        grad_output = torch.zeros_like(v)
    q, k, v, do = (_rows(x) for x in (q, k, v, grad_output))
    initial_state, grad_final = _states(initial_state, like), _states(grad_final, like)
    received = incoming if incoming.numel() else None
    plan = _plan(op, q, v, initial_state is not None)
    back = _plan(op, q, v, grad_final is not None, reverse=True, with_final=needs_initial)
    states_back, outgoing = chunk_state(
        q, do, rates, back, reaches_of(op.rates, op.state_eps),
        initial_state=grad_final, scale=op.scale,
    )  # fmt: skip
    wait = _start(outgoing, rates, back.flow, op)
    edges = EdgeStates(states, initial_state, received)
    dq = chunk_scan(do, v, k, rates, plan, edges, scale=op.scale, transposed=True)
    grad_initial = None
    if needs_initial:
        flow = back.flow
        grad_initial = _final_states(q, v, flow.num_documents, grad_final, flow.empty_documents)
    edges = EdgeStates(states_back, grad_final, wait(), grad_initial)
    dk, dv = key_value_gradients(q, k, v, do, rates, back, edges, scale=op.scale)
    return (
        rows_of_heads(dq, like),
        rows_of_heads(dk, like),
        rows_of_heads(dv, like),
        states.new_empty(0) if grad_initial is None else states_of_rows(grad_initial, like),
    )


def _plan(
    op: OpContext,
    q: Tensor,
    v: Tensor,
    with_initial: bool,
    *,
    reverse: bool = False,
    with_final: bool = False,
) -> Plan:
    length = segment_length(q, v, reaches_of(op.rates, op.state_eps))
    return plan_of(
        op.layout, op.rank, q.device, reverse=reverse, with_initial=with_initial,
        with_final=with_final if reverse else op.with_final_state, length=length,
    )  # fmt: skip


def _rates(op: OpContext, q: Tensor) -> Tensor:
    return rates_by_value(op.rates, q.device, torch.float32)


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides of tokens and heads, but rows of a head lie in one piece."""
    x = heads_of_rows(x)
    return x if x.stride(2) == 1 else x.contiguous()


def _states(states: Tensor | None, q: Tensor) -> Tensor | None:
    return None if states is None else states_of_heads(states, q).contiguous()


def _start(
    outgoing: Tensor, rates: Tensor, flow: StateFlow, op: OpContext
) -> Callable[[], Tensor | None]:
    """As ``start``; None comes in if no document is cut: nothing to load then."""
    if flow.num_slots == 0:
        return lambda: None
    wait = start(outgoing, rates, flow, op)
    return lambda: wait().contiguous()


def _final_states(
    q: Tensor, v: Tensor, num_documents: int, initial_state: Tensor | None, empty: tuple[int, ...]
) -> Tensor:
    """Zero for documents that end elsewhere, the initial state for empty ones; to be filled in."""
    states = torch.zeros(
        num_documents, q.shape[1], q.shape[2], v.shape[2], dtype=torch.float32, device=q.device
    )
    if initial_state is not None:
        for document in empty:
            states[document] = initial_state[document]
    return states
