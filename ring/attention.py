"""Exact softmax attention over a packed batch cut across ranks, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lasp.graphs import outside_graphs
from lasp.layout import SequenceLayout
from ring.block import QKV, Block, Segments, resolve_block
from ring.exchange import add_returned, fetch_kv, return_kv_gradients
from ring.merge import Partial, merge
from ring.schedule import Rectangle, RingSchedule, plan_ring


class RingOutput(NamedTuple):
    """What :func:`ring_attention` returns.

    Attributes:
        output: ``[T, Hq, D]`` or ``[B, T, Hq, D]``, dtype of ``q``.
        lse: log-sum-exp of each row's scores, ``[T, Hq]`` or ``[B, T, Hq]``, float32 (float64 for
            float64); not differentiable.
    """

    output: Tensor
    lse: Tensor


@outside_graphs
def ring_attention(  # the operator: its arguments are its documentation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    cp_group: dist.ProcessGroup | None = None,
    causal: bool = True,
    scale: float | None = None,
    block: str = "auto",
) -> RingOutput:
    """Softmax attention within each document of a pack whose tokens are spread over ranks.

    For query t and the keys s of its document, on whatever rank (s <= t if causal)::

        lse_t = log sum_s exp(scale q_t . k_s)        o_t = sum_s exp(scale q_t . k_s - lse_t) v_s

    Exact for any document lengths, any number of ranks and any order of the layout. Tokens of
    the layout's tail padding attend to padding only; their rows are finite and mean nothing.

    Args:
        q: ``[T, Hq, D]``, the tokens of this rank; or ``[B, T, Hq, D]``, B rows under one layout
            of one document. float16, bfloat16, float32 or float64, autocast or not.
        k: ``[T, Hkv, D]`` or ``[B, T, Hkv, D]``, dtype and device of ``q``. Hkv divides Hq; query
            head h reads key head h // (Hq / Hkv).
        v: as ``k``.
        layout: the same on every rank. None: the T tokens are one document, on one rank.
        cp_group: the P = ``layout.num_ranks`` ranks that hold the pack. None: one rank.
        causal: a query sees itself and what comes before it in its document; else all of it.
        scale: factor of the scores; None: 1 / sqrt(D).
        block: kernel, ``auto``, ``cudnn``, ``flash``, ``cpu_flash`` or ``eager``: see
            :func:`ring.block.resolve_block`.

    Returns:
        Output and log-sum-exp of this rank's tokens.

    Gradients: to ``q``, ``k`` and ``v``, once; every rank must run the backward. Contributions to
    each are summed in float32 (float64 for float64) in a fixed order. Two runs are bit-identical
    with ``eager`` and ``cpu_flash``, and with ``flash`` under
    ``torch.use_deterministic_algorithms(True)``.

    Communication: forward, one all-to-all-v over ``cp_group`` under the local attention: every
    rank receives the keys and values that its rows need from others, each once: ``2 R Hkv D``
    elements, R = ``sum(plan_ring(layout, rank, causal).received_tokens)``. Backward, the same
    again (nothing received is kept), then the way back in float32. None at all, on any rank, if
    no document needs it. The received tokens, and in the backward their gradients, are in memory
    at once.

    Raises:
        ValueError: naming the argument, before any communication, if shapes, dtypes or devices
            do not fit together, the layout is of another length or number of ranks, or the block
            is unknown or cannot run these tensors.

    Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889;
    varlen over the whole pack: MiniMax-01, arXiv:2501.08313, section 3.2.1.
    """
    _check_tensors(q, k, v)
    layout, rank = locate("q", q, -3, layout, cp_group)
    if q.ndim == 4 and layout.num_documents != 1:
        raise ValueError(
            "layout must hold one document when q is [B, T, Hq, D], whose rows share it, got"
            f" {layout.num_documents}: pack the rows end to end as [T, Hq, D]"
        )
    kernel = resolve_block(block, q.device, q.dtype, q.shape[-1])
    schedule = plan_ring(layout, rank, bool(causal))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    # Kernels take any strides but that of the head dim.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if q.ndim == 3:
        return RingOutput(*_attend(q, k, v, schedule, cp_group, kernel, scale))
    # Rows under one layout are more heads: query head b Hq + h, key head b Hkv + h // (Hq / Hkv).
    q_THD, k_THD, v_THD = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))
    parts = _attend(q_THD, k_THD, v_THD, schedule, cp_group, kernel, scale)
    heads = (q.shape[0], q.shape[2])
    return RingOutput(*(part.unflatten(1, heads).transpose(0, 1) for part in parts))


class _RingAttention(torch.autograd.Function):
    """The algorithm; its arguments are checked."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        schedule: RingSchedule,
        cp_group: dist.ProcessGroup | None,
        block: Block,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            output, lse = _forward(QKV(q, k, v), schedule, cp_group, block, scale)
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.mark_non_differentiable(lse)
        ctx.arguments = (schedule, cp_group, block, scale)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        schedule, cp_group, block, scale = ctx.arguments
        qkv, merged = QKV(q, k, v), Partial(output, lse)
        with torch.autocast(q.device.type, enabled=False):
            gradients = _backward(doutput, merged, qkv, schedule, cp_group, block, scale)
        return *gradients, None, None, None, None


_attend: Callable[..., tuple[Tensor, Tensor]] = _RingAttention.apply


def _forward(
    qkv: QKV,
    schedule: RingSchedule,
    cp_group: dist.ProcessGroup | None,
    block: Block,
    scale: float,
) -> Partial:
    transfer = fetch_kv(qkv.k, qkv.v, schedule, cp_group)
    segments = _segments(schedule, qkv.q.device)
    output, lse = block.forward_varlen(qkv, segments, scale=scale)
    received = transfer.wait()
    for rectangle in schedule.rectangles:
        rows = slice(*rectangle.rows)
        outside = block.forward(_gather(rectangle, qkv, received), causal=False, scale=scale)
        # A row is in one rectangle at most: stored once, whatever the dtype of the output.
        output[rows], lse[rows] = merge(Partial(output[rows], lse[rows]), outside)
    return Partial(output.to(qkv.q.dtype), lse)


def _backward(
    doutput: Tensor,
    merged: Partial,
    qkv: QKV,
    schedule: RingSchedule,
    cp_group: dist.ProcessGroup | None,
    block: Block,
    scale: float,
) -> QKV:
    transfer = fetch_kv(qkv.k, qkv.v, schedule, cp_group)
    doutput, accumulator = doutput.contiguous(), merged.lse.dtype
    segments = _segments(schedule, qkv.q.device)
    dq, dk, dv = block.backward_varlen(doutput, merged, qkv, segments, scale=scale)
    # The sums are float32 or float64; a kernel's parts come rounded to its own dtype.
    dq, dkv = dq.to(accumulator), torch.stack((dk, dv), dim=1).to(accumulator)
    received = transfer.wait()
    dkv_received = torch.zeros_like(received, dtype=accumulator)
    for rectangle in schedule.rectangles:
        rows = slice(*rectangle.rows)
        of_rows, part = Partial(*(x[rows] for x in merged)), _gather(rectangle, qkv, received)
        outside = block.backward(doutput[rows], of_rows, part, causal=False, scale=scale)
        dq[rows] += outside.q
        _scatter_add(rectangle, outside, dkv, dkv_received)
    returned = return_kv_gradients(dkv_received, schedule, cp_group).wait()
    add_returned(dkv, returned, schedule)
    return QKV(dq.to(qkv.q.dtype), *dkv.to(qkv.k.dtype).unbind(1))


def _segments(schedule: RingSchedule, device: torch.device) -> Segments:
    layout, rank = schedule.layout, schedule.rank
    starts = (fragment.offset for fragment in layout.fragments(rank))
    borders = (*starts, layout.num_local_tokens)
    return Segments(borders, layout.cu_seqlens(rank, device), schedule.causal)


def _gather(rectangle: Rectangle, qkv: QKV, received: Tensor) -> QKV:
    """Rows and keys of a rectangle; copied only where the keys lie in several pieces."""
    keys = _key_slices(rectangle, qkv.k, received[:, 0])
    values = _key_slices(rectangle, qkv.v, received[:, 1])
    if len(keys) == 1:
        return QKV(qkv.q[slice(*rectangle.rows)], keys[0], values[0])
    return QKV(qkv.q[slice(*rectangle.rows)], torch.cat(keys), torch.cat(values))


def _scatter_add(rectangle: Rectangle, grads: QKV, dkv: Tensor, dkv_received: Tensor) -> None:
    """Add a rectangle's dk and dv where :func:`_gather` took k and v from."""
    targets = _key_slices(rectangle, dkv, dkv_received)
    parts = torch.stack((grads.k, grads.v), dim=1).split([len(target) for target in targets])
    for target, part in zip(targets, parts):
        target += part


def _key_slices(rectangle: Rectangle, own: Tensor, received: Tensor) -> list[Tensor]:
    """Views of the rectangle's keys in two tensors laid out like the rank and the buffer."""
    return [own[a:b] for a, b in rectangle.own_keys] + [
        received[a:b] for a, b in rectangle.received_keys
    ]


def locate(
    name: str,
    x: Tensor,
    token_dim: int,
    layout: SequenceLayout | None,
    cp_group: dist.ProcessGroup | None,
) -> tuple[SequenceLayout, int]:
    """The layout of the tokens of ``x``, the argument ``name``, and the rank within ``cp_group``.

    Raises:
        ValueError: if the layout is of another length or of another number of ranks.
    """
    if cp_group is not None and not isinstance(cp_group, dist.ProcessGroup):
        raise ValueError(
            f"cp_group must be a process group that holds this rank, got {cp_group!r}: call the"
            " operator on the members of the group only"
        )
    num_tokens = x.shape[token_dim]
    if layout is None:
        layout = SequenceLayout((num_tokens,), num_ranks=1)
    num_ranks = 1 if cp_group is None else cp_group.size()
    if layout.num_ranks != num_ranks:
        raise ValueError(
            f"layout must be for the {num_ranks} ranks of cp_group, got num_ranks"
            f" {layout.num_ranks}: build it with cp_group.size() and pass that group"
        )
    if layout.num_local_tokens != num_tokens:
        raise ValueError(
            f"layout must hold the {num_tokens} tokens a rank of {name} {tuple(x.shape)}, got"
            f" {layout.num_local_tokens}: is this the layout of this batch, and {name} sharded"
            " by it?"
        )
    return layout, 0 if cp_group is None else cp_group.rank()


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim not in (3, 4) or k.shape != v.shape or k.ndim != q.ndim:
        raise ValueError(
            "q must be [T, Hq, D] or [B, T, Hq, D], k and v [T, Hkv, D] or [B, T, Hkv, D],"
            f" got {shapes}"
        )
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q, k and v must not be empty, got {shapes}: drop empty batches")
    if q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k and v must have the same rows, tokens and head dim, got {shapes}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"the heads of k must divide those of q, got {shapes}: under tensor parallelism"
            " repeat key heads or use fewer ranks"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if {k.dtype, v.dtype} != {q.dtype}:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if {k.device, v.device} != {q.device}:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )
