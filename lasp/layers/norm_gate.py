"""What lies after lightning attention in its layer: norm and gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lasp._core.autocast import autocast_inputs
from lasp._core.derivatives import Reference, refuse_transforms
from lasp._core.dtypes import wide_dtype
from lasp._core.impl import Impl, chosen_impl
from lasp._core.joint_backward import join_backward
from lasp.lightning.triton.tuning import WIDEST_ROW

_NORM_OVER_RANKS = Reference("lasp.layers.norm_gate.norm_gate over a tp_group", "tp_group=None")


def norm_gate(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    num_groups: int = 1,
    silu: bool = False,
    gate_first: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The output norm and gate of all lightning layers.

    ``norm(x) * weight * g(gate)``, or ``norm(x * g(gate)) * weight`` with ``gate_first``, where
    ``norm(x) = x / sqrt(mean(x^2) + eps)`` over each of ``num_groups`` equal groups of neighbouring
    features.

    Args:
        x: ``[..., W]``, the output of the attention, heads side by side; any strides. bf16, fp16,
            fp32 or fp64; under autocast x and gate are cast to its dtype.
        gate: like ``x``; None: no gate.
        weight: ``[W]``.
        eps: added to the mean square.
        num_groups: groups of this rank's features.
        silu: g is SiLU, not the sigmoid.
        gate_first: whether the gate is under the norm.
        tp_group: the ranks that share the features of a token, W each: the mean of the one group is
            over all of them. None: this one has them all.
        impl: ``eager``, plain torch; ``triton``, one kernel forward and one backward, and with a
            ``tp_group`` a small one before each: bf16, fp16 or fp32, groups of up to 16384 features
            a rank; ``auto``, ``triton`` where it can, see ``lasp._core.impl``.

    Returns:
        ``[..., W]`` in the dtype of ``x``; computed in float32 or wider.

    Gradients: to ``x``, ``gate`` and ``weight``; the same bits every time. ``triton`` saves the
    inputs and one number a token and group.

    Communication: over ``tp_group``, forward and backward, one all-reduce of 4 bytes a token. Every
    rank must run the backward: the result requires gradients wherever gradients are enabled.

    Raises:
        ValueError: naming the argument, before any communication.
    """
    x, *gates = autocast_inputs(x) if gate is None else autocast_inputs(x, gate)
    gate = gates[0] if gates else None
    _check_norm(x, gate, weight, num_groups, tp_group)
    width = x.shape[-1] // num_groups
    unserved = "" if width <= WIDEST_ROW else f"{width} features a rank, above {WIDEST_ROW}"
    how = chosen_impl(impl, x.device, x.dtype, unserved)
    x = join_backward(tp_group, x)
    if how == "eager":
        return _norm_gate(x, gate, weight, eps, num_groups, silu, gate_first, tp_group)
    from lasp.layers.triton import norm_gate as fused

    group_name = "" if tp_group is None else tp_group.group_name
    rows = [t if t is None or t.dim() == 2 else t.reshape(-1, t.shape[-1]) for t in (x, gate)]
    y: Tensor = fused.call(*rows, weight, eps, num_groups, silu, gate_first, group_name)[0]
    return y if x.dim() == 2 else y.view(x.shape)


def _check_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    num_groups: int,
    tp_group: dist.ProcessGroup | None,
) -> None:
    like_x = gate is None or (gate.shape, gate.dtype, gate.device) == (x.shape, x.dtype, x.device)
    if gate is not None and not like_x:
        raise ValueError(
            f"gate must be like x, {tuple(x.shape)} in {x.dtype} on {x.device}, got"
            f" {tuple(gate.shape)} in {gate.dtype} on {gate.device}"
        )
    if weight.shape != x.shape[-1:] or weight.device != x.device:
        raise ValueError(
            f"weight must be [{x.shape[-1]}] on {x.device}, got {tuple(weight.shape)} on"
            f" {weight.device}: this rank's features"
        )
    if num_groups < 1 or x.shape[-1] % num_groups or (num_groups > 1 and tp_group is not None):
        raise ValueError(
            f"num_groups must divide {x.shape[-1]} features, and be 1 with a tp_group, got"
            f" {num_groups}: a group is of whole heads, on one rank or over all"
        )


def _norm_gate(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    eps: float,
    num_groups: int,
    silu: bool,
    gate_first: bool,
    tp_group: dist.ProcessGroup | None,
) -> Tensor:
    """:func:`norm_gate` in plain torch."""
    wide, factor = x.to(wide_dtype(x.dtype)), None
    if gate is not None:
        factor = (F.silu if silu else torch.sigmoid)(gate.to(wide.dtype))
        if gate_first:
            wide = wide * factor
    squares, size = wide.unflatten(-1, (num_groups, -1)).square(), x.shape[-1] // num_groups
    squares = squares.sum(-1, keepdim=True)
    if tp_group is not None:
        squares = sum_over_ranks(squares, tp_group)
        size *= tp_group.size()
    scaled = wide.unflatten(-1, (num_groups, -1)) * torch.rsqrt(squares / size + eps)
    normed: Tensor = scaled.flatten(-2) * weight
    return (normed if factor is None or gate_first else normed * factor).to(x.dtype)


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``x`` over ``group``, which every rank uses in its own way.

    Gradients: to ``x``, those of all ranks summed; of any order.

    Communication: one all-reduce of ``x``, forward and backward.
    """
    refuse_transforms(_NORM_OVER_RANKS, x)
    total: Tensor = _SumOverRanks.apply(x, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None  # differentiable in its turn
