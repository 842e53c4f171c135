"""Rotary position embedding on the first dims of each head, at positions within the document."""

from __future__ import annotations

import torch
from torch import Tensor

from lasp._core.dtypes import wide_dtype


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Raise ValueError unless ``rotary_dim`` is even and in [0, head_dim]."""
    if rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim must be even and in [0, {head_dim}], the head dim, got {rotary_dim}:"
            " MiniMax-01 rotates half of each head"
        )


def apply_rotary(x: Tensor, position_ids: Tensor, *, rotary_dim: int, base: float) -> Tensor:
    """Rotate pairs (i, i + rotary_dim / 2) of the first ``rotary_dim`` dims of each head.

    Equation, at position p, with the angle a_i = p base^(-2 i / rotary_dim)::

        y_i          = x_i cos a_i - x_j sin a_i          i < rotary_dim / 2
        y_j          = x_j cos a_i + x_i sin a_i          j = i + rotary_dim / 2

    Dims from ``rotary_dim`` on pass through. This is the half-split ("rotate_half") pairing of
    Hugging Face's models. Angles are computed in float64: in float32 the angle of a position near
    one million is off by up to 0.03. The rotation is computed in float32, or float64 for float64.

    Args:
        x: ``[..., T, H, D]``.
        position_ids: int64 ``[T]``, as ``SequenceLayout.position_ids`` gives them.
        rotary_dim: even, at most D; 0 rotates nothing.
        base: of the geometric sequence of wavelengths.

    Returns:
        Like ``x``.

    Gradients: to ``x``.

    Raises:
        ValueError: naming the argument, if ``rotary_dim`` is odd or exceeds D, or there is not one
            integer position for each token.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    check_rotary_dim(rotary_dim, x.shape[-1])
    if position_ids.shape != x.shape[-3:-2] or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids must be {x.shape[-3]} integers, one a token, got shape"
            f" {tuple(position_ids.shape)} of {position_ids.dtype}"
        )
    half = rotary_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=x.device) / max(half, 1)
    angles_T1F = (position_ids.double().unsqueeze(-1) * base**-exponents).unsqueeze(-2)
    wide = wide_dtype(x.dtype)
    cos, sin = angles_T1F.cos().to(wide), angles_T1F.sin().to(wide)
    first, second, rest = x.split((half, half, x.shape[-1] - rotary_dim), dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in rotated), rest), dim=-1)
