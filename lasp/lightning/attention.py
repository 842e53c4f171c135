"""Lightning attention over a sequence cut across ranks (LASP+): the operator.

Per head, with ``lambda = exp(-rate)`` and S reset at each document start::

    S_t = lambda S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

Ranks hold runs of the pack. What happened before a run reaches it as one K x V state a head, so
each rank sums up its own tokens, starts to gather the sums of the others, computes its output as if
nothing had come before, and adds the part of the incoming state when that is there. The backward
is the same with time reversed: gradients of states flow from later runs to earlier ones.

Rates are checked and remembered by value on the host: those on the CPU are copied to a device once.
The Triton kernels take any strides of tokens and heads, and are fastest at K and V of 64 and 128;
with ``output_final_state=False`` they need not cut their work at the end of each document.

Gradients: every rank must run the backward, one whose own inputs need no gradient too: over several
ranks the results require gradients wherever gradients are enabled (``torch.no_grad()`` is for what
no rank trains). That of an initial state is nonzero where the state is read. Saved for the
backward: the inputs, the incoming state of each run and, with ``triton``, that of each segment,
float32.

Communication: the first call on a group compares how ranks call
(:func:`lasp._core.consistency.check_same_calls`). Forward and backward each exchange states once,
and only if a document is cut:
``all_gather`` receives ``(P - 1) * runs * H * K * V * 4`` bytes (runs: the most sending ones of a
rank); for the others see ``lasp.state_exchange``. In the forward ``eager`` computes under it and
``triton`` waits for it, in the backward dq is computed under it.

Source: Lightning Attention-2, arXiv:2401.04658; LASP, arXiv:2404.02882; LASP+, MiniMax-01,
arXiv:2501.08313, section 3.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.autocast import autocast_inputs
from lasp._core.checks import check_flags
from lasp._core.derivatives import refuse_second_derivatives, refuse_transforms
from lasp._core.dtypes import wide_dtype
from lasp._core.graphs import outside_graphs
from lasp._core.impl import Impl, chosen_impl
from lasp._core.joint_backward import join_backward
from lasp.lightning import eager as ops
from lasp.lightning.decay import rates_by_value
from lasp.lightning.op_context import (
    REFERENCE,
    OpContext,
    Settings,
    heads_of_rows,
    rows_of_heads,
    start,
    states_of_heads,
    states_of_rows,
)
from lasp.lightning.validation import (
    check_first_call,
    check_kinds,
    check_qkv,
    checked_context,
    unserved,
)
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange import Exchange


class LightningOutput(NamedTuple):
    """What :func:`lightning_attention` returns.

    Attributes:
        output: ``[T, H, V]`` or ``[B, T, H, V]``, in the dtype of ``q``.
        final_state: ``[N, H, K, V]`` or ``[B, H, K, V]``; None if not asked for.
    """

    output: Tensor
    final_state: Tensor | None


class _LightningAttention(torch.autograd.Function):
    """q, k: [T, H, K], v: [T, H, V], rates: [H] and initial_state: [N, H, K, V] in state dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rates: Tensor,
        initial_state: Tensor | None,
        op: OpContext,
    ) -> tuple[Tensor, Tensor | None]:
        flow = flow_of(op.layout, op.rank)
        with torch.autocast(q.device.type, enabled=False):
            local_states = ops.chunk_state(k, v, rates, flow, initial_state=initial_state)
            wait = start(local_states, rates, flow, op)
            scaled_q = _scaled(q, op.scale, rates)
            output, final_state = ops.chunk_scan(
                scaled_q,
                k,
                v,
                rates,
                flow,
                initial_state=initial_state,
                with_final_state=op.with_final_state,
            )
            incoming = wait()
            ops.add_incoming(output, scaled_q, rates, flow, incoming, final_state=final_state)
        ctx.save_for_backward(q, k, v, rates, initial_state, incoming)
        ctx.op = op
        ctx.set_materialize_grads(False)
        return output.to(q.dtype), final_state

    @staticmethod
    @refuse_second_derivatives(REFERENCE)
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dq, dk, dv, grad_initial = _gradients(ctx, grad_output, grad_final)
        return dq, dk, dv, None, grad_initial, None


def _gradients(
    ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, rates, initial_state, incoming = ctx.saved_tensors
    op = ctx.op
    flow, back = (flow_of(op.layout, op.rank, reverse=r) for r in (False, True))
    if grad_output is None:  # only the final state was used, on this rank
        grad_output = v.new_zeros(()).expand_as(v)
    with torch.autocast(q.device.type, enabled=False):
        do = _scaled(grad_output, op.scale, rates)
        local_states = ops.chunk_state(q, do, rates, back, initial_state=grad_final)
        wait = start(local_states, rates, back, op)
        # dq needs only states of the forward pass: it runs under the exchange too.
        dq, _ = ops.chunk_scan(
            do, v, k, rates, flow, initial_state=_transpose(initial_state), incoming=incoming.mT
        )
        dk, _ = ops.chunk_scan(v, do, q, rates, back, initial_state=_transpose(grad_final))
        dv, grad_initial = ops.chunk_scan(
            k,
            q,
            do,
            rates,
            back,
            initial_state=grad_final,
            with_final_state=ctx.needs_input_grad[4],
        )
        grad_incoming = wait()
        ops.add_incoming(dk, v, rates, back, grad_incoming.mT)
        ops.add_incoming(dv, k, rates, back, grad_incoming, final_state=grad_initial)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), grad_initial


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    *,
    layout: SequenceLayout | None = None,
    cp_group: dist.ProcessGroup | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    exchange: Exchange = "auto",
    impl: Impl = "auto",
    output_final_state: bool = True,
    state_eps: float | None = None,
) -> LightningOutput:
    """Causal linear attention with constant decay, over packed documents and over ranks.

    ``S_t = exp(-rate) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t``, for each head, S reset to the
    initial state at each document start. Exact: documents may be cut anywhere by rank borders.

    Args:
        q: this rank's queries, ``layout.shard`` of the pack: ``[T, H, K]``, or ``[B, T, H, K]``
            for B rows that each hold one document of the layout. bf16, fp16, fp32 or fp64; any
            strides. Under autocast q, k and v are cast to its dtype; states stay float32.
        k: keys, as ``q``.
        v: values ``[T, H, V]`` or ``[B, T, H, V]``; V need not be K.
        rates: decay rates ``[H]`` of this rank's heads, float32 or float64, finite and >= 0, see
            ``decay_rates``; from the CPU, or every call waits for their device.
        layout: who holds which tokens; by default one document of T tokens on one rank.
        cp_group: the context-parallel ranks, ``layout.num_ranks`` of them; None for one rank.
        scale: factor of the output; MiniMax uses 1, not K^-0.5.
        initial_state: state before each document ``[N, H, K, V]`` (``[B, H, K, V]`` batched),
            float32, or float64 with fp64 inputs; default zero. Row n is read on the rank that
            holds the first token of document n, on rank 0 for an empty document.
        exchange: how states cross ranks, see ``lasp.state_exchange``.
        impl: who computes: ``eager``, plain torch; ``triton``, kernels for GPUs: bf16, fp16 or
            fp32, K and V up to 256; ``auto``, ``triton`` where it can, see ``lasp._core.impl``.
        output_final_state: False saves ``N H K V`` elements a rank.
        state_eps: what has decayed below this may be left out of a state that crosses segments
            (``triton``) or passes through a run on its way between ranks; 0 keeps all. None: a
            512th of the last digit of a state, 2^-32 in float32 and 2^-61 in float64.

    Returns:
        The output and the final states, float32 (float64 with fp64 inputs). Row n is the state
        after document n on the rank that holds its last token (rank 0 for an empty document), and
        zero on every other: the sum over ranks is the whole. The tail padding has no row.

    Gradients: to ``q``, ``k``, ``v`` and ``initial_state``, once, from both results; none to
    ``rates``. Every rank runs the backward.

    Communication: states, once each way, if a document is cut, as the module counts them.

    Raises:
        ValueError: naming the argument, before any communication; on every rank, if ranks differ
            in dtype, shapes, rates, layout or options in their first call on the group.
        lasp.state_exchange.ExchangeError: if a rank is gone, see ``lasp._core.failure``.
    """
    eps = _default_eps(q) if state_eps is None else state_eps
    settings = Settings(layout, cp_group, scale, exchange, output_final_state, eps)
    return _computed(impl, q, k, v, rates, initial_state, settings)


def _default_eps(q: Tensor) -> float:
    return 2.0**-61 if q.dtype == torch.float64 else 2.0**-32


def _computed(
    impl: Impl,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    initial_state: Tensor | None,
    settings: Settings,
) -> LightningOutput:
    """By whom ``impl`` chooses."""
    if type(settings.output_final_state) is not bool:
        check_flags(output_final_state=settings.output_final_state)  # type: ignore[unreachable]
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v)
    if chosen_impl(impl, q.device, q.dtype, unserved(q, v)) == "eager":
        return _attend(q, k, v, rates, initial_state, settings)
    from lasp.lightning.triton.torch_ops import attend  # which checks the rest when it runs

    return LightningOutput(*attend(q, k, v, rates, initial_state, settings))


@outside_graphs
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    initial_state: Tensor | None,
    settings: Settings,
) -> LightningOutput:
    refuse_transforms(REFERENCE, q, k, v, rates, initial_state)
    check_kinds(rates, q, settings)
    check_first_call(q, v, rates, settings)
    op = checked_context(q, v, rates, initial_state, settings)
    q = join_backward(op.cp_group, q, k, v, initial_state)
    if initial_state is not None:
        initial_state = states_of_heads(initial_state, q)
    tensors = [heads_of_rows(x) for x in (q, k, v)]
    on_device = rates_by_value(op.rates, q.device, wide_dtype(q.dtype))
    output, final_state = _LightningAttention.apply(  # type: ignore[no-untyped-call]
        *tensors, on_device, initial_state, op
    )
    if final_state is not None:
        final_state = states_of_rows(final_state, q)
    return LightningOutput(rows_of_heads(output, q), final_state)


def _scaled(x: Tensor, scale: float, rates: Tensor) -> Tensor:
    """Scaled in the dtype to compute in; untouched for scale 1."""
    return x if scale == 1.0 else x.to(rates.dtype) * scale


def _transpose(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.mT
