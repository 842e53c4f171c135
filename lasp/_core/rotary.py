"""Rotary position embedding on the first dims of each head, at positions within the document."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lasp._core.checks import (
    check_flags,
    check_part,
    check_positive,
    check_positive_or_none,
    check_sizes,
    check_sizes_or_none,
)
from lasp._core.dtypes import wide_dtype


@dataclass(frozen=True)
class RopeScaling:
    """Slower rotations, for contexts longer than those a model was trained on.

    Fields are named as in the ``rope_scaling`` of Hugging Face's configs.

    Attributes:
        rope_type: ``linear``: all angles are divided by ``factor``; ``yarn``: those of long
            wavelengths are, those of short ones are not, with a ramp between.
        factor: by how much longer contexts are, >= 1.
        original_max_position_embeddings: tokens of the contexts of training; ``yarn`` needs it.
        beta_fast: rotations over them from which on angles stay as they are.
        beta_slow: rotations over them up to which angles are divided.
        attention_factor: of the rotated dims of queries and of keys; None: 1 for ``linear``; for
            ``yarn`` by ``mscale`` and ``mscale_all_dim`` if both are given, else
            ``0.1 ln(factor) + 1``.
        mscale: see ``attention_factor``.
        mscale_all_dim: likewise; and latent attention has ``(0.1 mscale_all_dim ln(factor) + 1)^2``
            more in the scale of its scores (DeepSeek-V3).
        truncate: whether the ends of the ramp are whole dims.

    Raises:
        ValueError: naming the field.

    Source: Peng et al., "YaRN", arXiv:2309.00071; transformers 5.24 ``modeling_rope_utils.py``.
    """

    rope_type: Literal["linear", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "yarn"):
            raise ValueError(
                f"rope_type must be 'linear' or 'yarn', got {self.rope_type!r}: rotations that"
                " depend on the length of the batch, or have a factor for each dim, are not here"
            )
        check_flags(truncate=self.truncate)
        check_positive(factor=self.factor, beta_fast=self.beta_fast, beta_slow=self.beta_slow)
        check_positive_or_none(attention_factor=self.attention_factor)
        check_sizes_or_none(original_max_position_embeddings=self.original_max_position_embeddings)
        for name in ("mscale", "mscale_all_dim"):
            if value := getattr(self, name):  # 0 says as much as None
                check_positive(**{name: value})
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast must be at least beta_slow {self.beta_slow}, got {self.beta_fast}: fast"
                " rotations stay as they are"
            )
        if self.factor < 1:
            raise ValueError(f"factor must be >= 1, got {self.factor}: contexts grow by it")
        if self.rope_type == "yarn" and self.original_max_position_embeddings is None:
            raise ValueError(
                "original_max_position_embeddings must be given for rope_type 'yarn', got None: it"
                " decides which wavelengths are long"
            )

    @property
    def rotated_factor(self) -> float:
        """Factor of the rotated dims."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "linear":
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return self.magnitude(self.mscale) / self.magnitude(self.mscale_all_dim)
        return self.magnitude(1.0)

    @property
    def latent_factor(self) -> float:
        """Factor of the scores of latent attention."""
        return self.magnitude(self.mscale_all_dim or 0.0) ** 2

    def magnitude(self, mscale: float) -> float:
        """YaRN's factor for ``mscale``."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def scaled(self, frequencies: Tensor, base: float) -> Tensor:
        """The frequencies ``base^(-2 i / rotary_dim)`` of all pairs i, scaled."""
        if self.rope_type == "linear":
            return frequencies / self.factor
        low, high = self._ramp(2 * len(frequencies), base)
        pairs = torch.arange(len(frequencies), dtype=torch.float64, device=frequencies.device)
        slowed = ((pairs - low) / (high - low)).clamp(0, 1)
        return frequencies * (slowed / self.factor + (1 - slowed))

    def _ramp(self, rotary_dim: int, base: float) -> tuple[float, float]:
        """Pairs up to the first are not scaled, from the second on they are wholly."""
        assert self.original_max_position_embeddings is not None
        length = self.original_max_position_embeddings

        def pair_with(rotations: float) -> float:
            return rotary_dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        return low, high if high != low else high + 0.001  # no division by 0


def check_rotation(rope_base: float, rope_scaling: RopeScaling | None) -> None:
    """Raise ValueError unless angles follow from these two."""
    check_positive(rope_base=rope_base)
    check_part("rope_scaling", rope_scaling, RopeScaling, optional=True)
    if rope_scaling is not None and rope_scaling.rope_type == "yarn" and rope_base <= 1:
        raise ValueError(
            f"rope_base must be above 1 with rope_type 'yarn', got {rope_base}: its ramp asks which"
            " pairs have long wavelengths, and they grow with the base"
        )


def check_even(name: str, dim: int) -> None:
    """Raise ValueError unless the size ``name`` is even and at least 0."""
    check_sizes(0, **{name: dim})
    if dim % 2:
        raise ValueError(f"{name} must be even, got {dim}: dims are rotated in pairs")


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Raise ValueError unless ``rotary_dim`` is even and in [0, head_dim]."""
    whole = isinstance(rotary_dim, int) and not isinstance(rotary_dim, bool)
    if not whole or rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim must be even and in [0, {head_dim}], the head dim, got {rotary_dim!r}:"
            " MiniMax-01 rotates half of each head"
        )


def rotary_table(
    position_ids: Tensor,
    rotary_dim: int,
    base: float,
    scaling: RopeScaling | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cos and sin of the angles of a rotation, ``[T, rotary_dim / 2]`` each, for q and k alike.

    At position p the angle a_i is ``p base^(-2 i / rotary_dim)``. Angles are computed in float64:
    in float32 that of a position near one million is off by up to 0.03.

    Args:
        position_ids: int64 ``[T]``, as ``SequenceLayout.position_ids`` gives them.
        rotary_dim: even; 0 rotates nothing.
        base: of the geometric sequence of wavelengths.
        scaling: of the angles, and of what is rotated; None: neither.
        dtype: of what is rotated; the table is in float32 for it, or float64 for float64.

    Source: Su et al., "RoFormer", arXiv:2104.09864.
    """
    half = rotary_dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=position_ids.device) / max(half, 1)
    frequencies = base**-exponents if scaling is None else scaling.scaled(base**-exponents, base)
    angles_TF = position_ids.double().unsqueeze(-1) * frequencies
    wide = wide_dtype(dtype)
    cos, sin = angles_TF.cos().to(wide), angles_TF.sin().to(wide)
    if scaling is not None:
        cos, sin = cos * scaling.rotated_factor, sin * scaling.rotated_factor
    return cos, sin


def rotated(x: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """``x [..., T, H, D]``, turned by a table of :func:`rotary_table` in the dtype of that.

    Pairs (i, j = i + rotary_dim / 2) of the first dims of each head turn, with the angle a_i::

        y_i = x_i cos a_i - x_j sin a_i        y_j = x_j cos a_i + x_i sin a_i

    Dims from ``rotary_dim`` on pass through. This is the half-split ("rotate_half") pairing of
    Hugging Face's models.

    Gradients: to ``x``.
    """
    half, cos, sin = cos_TF.shape[1], cos_TF.unsqueeze(-2), sin_TF.unsqueeze(-2)
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)
