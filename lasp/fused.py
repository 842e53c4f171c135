"""``lightning_attention(impl="triton")``: the schedule of the kernels.

The same passes as the eager function in ``lasp.attention``, but in the forward pass the output
waits for the exchange and starts from the received states: a second pass over the output, to add
their part, would cost more than the exchange it hides. The backward hides the exchange of gradients
under dq, which needs only states of the forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import launch
from lasp.call import Call, start
from lasp.segments import plan_of, reaches_of


class FusedLightningAttention(torch.autograd.Function):
    """q, k: [T, H, K], v: [T, H, V], rates: [H] and initial_state: [N, H, K, V] in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor,
        initial_state: Tensor | None,
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and final state."""
        q, k, v = (_rows(x) for x in (q, k, v))
        given = None if initial_state is None else initial_state.contiguous()
        reaches = reaches_of(call.rates, call.state_eps)
        cut = launch.segment_cut(q, v, reaches)
        plan = plan_of(
            call.layout, call.rank, q.device, reverse=False, given=given is not None,
            result=call.with_final_state, length=cut.length,
        )  # fmt: skip
        states, outgoing = launch.run_states(k, v, rates, plan, reaches, given=given, scale=1.0)
        incoming = _received(start(outgoing, rates, plan.flow, call)(), plan.flow.num_slots)
        final_state = None
        if call.with_final_state:
            final_state = _results(q, v, plan.flow.num_documents, given, plan.flow.empty_documents)
        output = launch.output(
            q, k, v, rates, plan, states,
            given=given, incoming=incoming, result=final_state, scale=call.scale, wide=cut.wide,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, rates, given, states, incoming)
        ctx.call, ctx.plan, ctx.cut = call, plan, cut
        ctx.set_materialize_grads(False)
        return output, final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and the initial state."""
        q, k, v, rates, given, states, incoming = ctx.saved_tensors
        call = ctx.call
        if grad_output is None:  # only the final state was used, on this rank
            grad_output = torch.zeros_like(v)
        do = _rows(grad_output)
        given_back = None if grad_final is None else grad_final.contiguous()
        needs_initial = ctx.needs_input_grad[4]
        back = plan_of(
            call.layout, call.rank, q.device, reverse=True, given=given_back is not None,
            result=needs_initial, length=ctx.cut.length,
        )  # fmt: skip
        states_back, outgoing = launch.run_states(
            q, do, rates, back, reaches_of(call.rates, call.state_eps),
            given=given_back, scale=call.scale,
        )  # fmt: skip
        wait = start(outgoing, rates, back.flow, call)
        dq = launch.output(
            do, v, k, rates, ctx.plan, states,
            given=given, incoming=incoming, scale=call.scale, wide=ctx.cut.wide,
            transposed=True,
        )  # fmt: skip
        grad_initial = None
        if needs_initial:
            grad_initial = _results(
                q, v, back.flow.num_documents, given_back, back.flow.empty_documents
            )
        incoming_back = _received(wait(), back.flow.num_slots)
        dk = launch.output(
            v, do, q, rates, back, states_back,
            given=given_back, incoming=incoming_back, scale=call.scale, wide=ctx.cut.wide,
            transposed=True,
        )  # fmt: skip
        dv = launch.output(
            k, q, do, rates, back, states_back,
            given=given_back, incoming=incoming_back, result=grad_initial, scale=call.scale,
            wide=ctx.cut.wide,
        )  # fmt: skip
        return dq, dk, dv, None, grad_initial, None


def _rows(x: Tensor) -> Tensor:
    """Kernels take any strides of tokens and heads, but rows of a head lie in one piece."""
    return x if x.stride(2) == 1 else x.contiguous()


def _received(incoming: Tensor, num_slots: int) -> Tensor | None:
    """None if no document is cut: nothing to load then."""
    return incoming.contiguous() if num_slots else None


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
