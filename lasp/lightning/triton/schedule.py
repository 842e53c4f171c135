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
    Call,
    heads_of_rows,
    rows_of_heads,
    start,
    states_of_heads,
    states_of_rows,
)
from lasp.lightning.triton.chunk_scan import chunk_scan, key_value_gradients
from lasp.lightning.triton.chunk_state import run_states, segment_length
from lasp.lightning.triton.segments import Plan, plan_of, reaches_of
from lasp.sequence.state_flow import Flow


def forward(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, final states, and what the backward needs of states; empty where there is none."""
    like, rates = q, _rates(call, q)
    q, k, v = (_rows(x) for x in (q, k, v))
    given = _given(initial_state, like)
    plan = _plan(call, q, v, given is not None)
    states, outgoing = run_states(
        k, v, rates, plan, reaches_of(call.rates, call.state_eps), given=given, scale=1.0
    )
    incoming = _start(outgoing, rates, plan.flow, call)()
    final_state = None
    if call.with_final_state:
        final_state = _results(q, v, plan.flow.num_documents, given, plan.flow.empty_documents)
    output = chunk_scan(
        q, k, v, rates, plan, states,
        given=given, incoming=incoming, result=final_state, scale=call.scale,
    )  # fmt: skip
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
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; the latter empty if not asked for."""
    like, rates = q, _rates(call, q)
    if grad_output is None:  # only the final state was used, on this rank
        grad_output = torch.zeros_like(v)
    q, k, v, do = (_rows(x) for x in (q, k, v, grad_output))
    given, given_back = _given(initial_state, like), _given(grad_final, like)
    received = incoming if incoming.numel() else None
    plan = _plan(call, q, v, given is not None)
    back = _plan(call, q, v, given_back is not None, reverse=True, result=needs_initial)
    states_back, outgoing = run_states(
        q, do, rates, back, reaches_of(call.rates, call.state_eps),
        given=given_back, scale=call.scale,
    )  # fmt: skip
    wait = _start(outgoing, rates, back.flow, call)
    dq = chunk_scan(
        do, v, k, rates, plan, states,
        given=given, incoming=received, scale=call.scale, transposed=True,
    )  # fmt: skip
    grad_initial = None
    if needs_initial:
        flow = back.flow
        grad_initial = _results(q, v, flow.num_documents, given_back, flow.empty_documents)
    incoming_back = wait()
    dk, dv = key_value_gradients(
        q, k, v, do, rates, back, states_back,
        given=given_back, incoming=incoming_back, result=grad_initial, scale=call.scale,
    )  # fmt: skip
    return (
        rows_of_heads(dq, like),
        rows_of_heads(dk, like),
        rows_of_heads(dv, like),
        states.new_empty(0) if grad_initial is None else states_of_rows(grad_initial, like),
    )


def _plan(
    call: Call, q: Tensor, v: Tensor, given: bool, *, reverse: bool = False, result: bool = False
) -> Plan:
    length = segment_length(q, v, reaches_of(call.rates, call.state_eps))
    return plan_of(
        call.layout, call.rank, q.device, reverse=reverse, given=given,
        result=result if reverse else call.with_final_state, length=length,
    )  # fmt: skip


def _rates(call: Call, q: Tensor) -> Tensor:
    return rates_by_value(call.rates, q.device, torch.float32)


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides of tokens and heads, but rows of a head lie in one piece."""
    x = heads_of_rows(x)
    return x if x.stride(2) == 1 else x.contiguous()


def _given(states: Tensor | None, q: Tensor) -> Tensor | None:
    return None if states is None else states_of_heads(states, q).contiguous()


def _start(outgoing: Tensor, rates: Tensor, flow: Flow, call: Call) -> Callable[[], Tensor | None]:
    """As ``start``; None comes in if no document is cut: nothing to load then."""
    if flow.num_slots == 0:
        return lambda: None
    wait = start(outgoing, rates, flow, call)
    return lambda: wait().contiguous()


def _results(
    q: Tensor, v: Tensor, num_documents: int, given: Tensor | None, empty: tuple[int, ...]
) -> Tensor:
    """Zero for documents that end elsewhere, the given state for empty ones, to be filled in."""
    results = torch.zeros(
        num_documents, q.shape[1], q.shape[2], v.shape[2], dtype=torch.float32, device=q.device
    )
    if given is not None:
        for document in empty:
            results[document] = given[document]
    return results
