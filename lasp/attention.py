"""Lightning attention over a sequence cut across ranks (LASP+): the operator.

Per head, with ``lambda = exp(-rate)`` and S reset at each document start::

    S_t = lambda S_{t-1} + k_t^T v_t        o_t = scale q_t S_t

Ranks hold runs of the pack. What happened before a run reaches it as one K x V state a head, so
each rank sums up its own tokens, starts to gather the sums of the others, computes its output as if
nothing had come before, and adds the part of the incoming state when that is there. The backward
is the same with time reversed: gradients of states flow from later runs to earlier ones.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp import ops
from lasp.call import Call, start
from lasp.exchange import Exchange, resolve_exchange
from lasp.flow import flow_of
from lasp.graphs import outside_graphs
from lasp.layout import SequenceLayout
from lasp.validation import (
    Impl,
    check_impl,
    check_initial_state,
    check_layout,
    check_qkv,
    check_rates,
    check_triton,
    state_dtype,
)


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
        call: Call,
    ) -> tuple[Tensor, Tensor | None]:
        flow = flow_of(call.layout, call.rank)
        with torch.autocast(q.device.type, enabled=False):
            local_states = ops.run_states(k, v, rates, flow, given=initial_state)
            wait = start(local_states, rates, flow, call)
            scaled_q = _scaled(q, call.scale, rates)
            output, final_state = ops.scan(
                scaled_q, k, v, rates, flow, given=initial_state, with_result=call.with_final_state
            )
            incoming = wait()
            ops.add_incoming(output, scaled_q, rates, flow, incoming, result=final_state)
        ctx.save_for_backward(q, k, v, rates, initial_state, incoming)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return output.to(q.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, rates, initial_state, incoming = ctx.saved_tensors
        call = ctx.call
        flow, back = (flow_of(call.layout, call.rank, reverse=r) for r in (False, True))
        if grad_output is None:  # only the final state was used, on this rank
            grad_output = v.new_zeros(()).expand_as(v)
        with torch.autocast(q.device.type, enabled=False):
            do = _scaled(grad_output, call.scale, rates)
            local_states = ops.run_states(q, do, rates, back, given=grad_final)
            wait = start(local_states, rates, back, call)
            # dq needs only states of the forward pass: it runs under the exchange too.
            dq, _ = ops.scan(
                do, v, k, rates, flow, given=_transpose(initial_state), incoming=incoming.mT
            )
            dk, _ = ops.scan(v, do, q, rates, back, given=_transpose(grad_final))
            dv, grad_initial = ops.scan(
                k, q, do, rates, back, given=grad_final, with_result=ctx.needs_input_grad[4]
            )
            grad_incoming = wait()
            ops.add_incoming(dk, v, rates, back, grad_incoming.mT)
            ops.add_incoming(dv, k, rates, back, grad_incoming, result=grad_initial)
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, grad_initial, None


@outside_graphs
def lightning_attention(  # the operator: its arguments are its documentation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    *,
    layout: SequenceLayout | None = None,
    cp_group: dist.ProcessGroup | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    exchange: Exchange = "all_gather",
    impl: Impl = "eager",
    output_final_state: bool = True,
    state_eps: float = 2.0**-32,
) -> LightningOutput:
    """Causal linear attention with constant decay, over packed documents and over ranks.

    ``S_t = exp(-rate) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t``, for each head, S reset to the
    initial state at each document start. Exact: documents may be cut anywhere by rank borders.

    Args:
        q: this rank's queries, ``layout.shard`` of the pack: ``[T, H, K]``, or ``[B, T, H, K]``
            for B rows that each hold one document of the layout. bf16, fp16, fp32 or fp64; any
            strides.
        k: keys, as ``q``.
        v: values ``[T, H, V]`` or ``[B, T, H, V]``; V need not be K.
        rates: decay rates ``[H]`` of this rank's heads, float32 or float64, finite and >= 0, see
            ``decay_rates``. On the CPU, where a check costs nothing; rates on the device of ``q``
            are taken too, but every call then waits for that device to read them. From the CPU
            they are copied once and remembered by value.
        layout: who holds which tokens; by default one document of T tokens on one rank.
        cp_group: the context-parallel ranks, ``layout.num_ranks`` of them; None for one rank.
        scale: factor of the output; MiniMax uses 1, not K^-0.5.
        initial_state: state before each document ``[N, H, K, V]`` (``[B, H, K, V]`` batched),
            float32, or float64 with fp64 inputs; default zero. Row n is read on the rank that
            holds the first token of document n, on rank 0 for an empty document.
        exchange: how states cross ranks, see ``lasp.exchange``.
        impl: who computes: ``eager``, plain torch; ``triton``, kernels for GPUs: bf16, fp16 or
            fp32, K and V up to 256 (fastest at 64 and 128), any strides of tokens and heads.
        output_final_state: False saves ``N H K V`` elements a rank, and with ``triton`` a cut of
            the work at the end of each document.
        state_eps: what has decayed below this may be left out of a state that crosses segments
            (``triton``) or passes through a rank (``one_hop``); 0 keeps all.

    Returns:
        The output and the final states, float32 (float64 with fp64 inputs). Row n is the state
        after document n on the rank that holds its last token (rank 0 for an empty document), and
        zero on every other: the sum over ranks is the whole. The tail padding is a document of its
        own and has no row.

    Gradients: to ``q``, ``k``, ``v`` and ``initial_state`` (nonzero where it is read), from both
    results. None to ``rates``. Every rank must run the backward. Saved for it: the inputs and the
    incoming state of each run, fp32.

    Communication: forward and backward each exchange states once, and only if a document is cut:
    ``all_gather`` receives ``(P - 1) * runs * H * K * V * 4`` bytes (runs: the most sending ones of
    a rank), under the local compute; for the others see ``lasp.exchange``.

    Raises:
        ValueError: naming the argument, before any communication.

    Source: Lightning Attention-2, arXiv:2401.04658; LASP, arXiv:2404.02882; LASP+, MiniMax-01,
    arXiv:2501.08313, section 3.2.
    """
    check_impl(impl)
    check_qkv(q, k, v)
    if impl == "triton":
        check_triton(q, v)
    values = check_rates(rates, q)
    if layout is None:
        layout = SequenceLayout((q.shape[-3],), num_ranks=1)
    rank = check_layout(layout, cp_group, q)
    check_initial_state(initial_state, q, v, layout)

    flow, num_ranks = flow_of(layout, rank), layout.num_ranks
    strategy = resolve_exchange(exchange, flow, num_ranks, values, state_eps)
    rows = q.shape[0] if q.dim() == 4 else 1
    call = Call(
        layout, rank, cp_group, scale, strategy, output_final_state, state_eps, values * rows
    )
    rates = rates if rates.device == q.device else _copied(values, q.device)
    rates = rates.to(state_dtype(q.dtype))
    if q.dim() == 3:
        return LightningOutput(*_apply(impl, q, k, v, rates, initial_state, call))

    # Heads are independent and rows share one layout: B rows of H heads are B H heads.
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
    if initial_state is not None:
        initial_state = initial_state.flatten(0, 1).unsqueeze(0)
    output, final_state = _apply(impl, q, k, v, rates.repeat(rows), initial_state, call)
    if final_state is not None:
        final_state = final_state.squeeze(0).unflatten(0, (rows, -1))
    return LightningOutput(output.unflatten(1, (rows, -1)).transpose(0, 1), final_state)


def _apply(impl: str, *args: Tensor | Call | None) -> tuple[Tensor, Tensor | None]:
    if impl == "eager":
        return _LightningAttention.apply(*args)  # type: ignore[no-untyped-call,no-any-return]
    from lasp.fused import FusedLightningAttention  # needs triton

    return FusedLightningAttention.apply(*args)  # type: ignore[no-untyped-call,no-any-return]


@lru_cache(maxsize=1024)  # one entry a layer; copying in every call would wait each time
def _copied(rates: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else a model first run in inference mode could not train
        return torch.tensor(rates, dtype=torch.float64, device=device)


def _scaled(x: Tensor, scale: float, rates: Tensor) -> Tensor:
    """Scaled in the dtype to compute in; untouched for scale 1."""
    return x if scale == 1.0 else x.to(rates.dtype) * scale


def _transpose(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.mT
