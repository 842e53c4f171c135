"""What a lightning layer computes around the attention: MiniMax-01, Ling and Ring, MiniCPM-SALA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lasp._core.checks import check_finite, check_flags, check_one_of, check_positive, check_sizes
from lasp._core.rotary import RopeScaling, check_even, check_rotary_dim, check_rotation

Activation = Literal["silu", "none"]
Gate = Literal["sigmoid", "silu", "none"]


@dataclass(frozen=True)
class LightningOptions:
    """The parts of a lightning layer; MiniMax-01's by default.

    ``q, k, v = activation(W_qkv x)``; ``q, k = rope(norm(q)), rope(norm(k))``;
    ``o = lightning_attention(q, k, v, scale)``; ``y = W_out (norm(o) * gate(W_gate x))``.

    Attributes:
        activation: of q, k and v.
        qk_norm: an RMSNorm over each head of q and of k, one weight ``[head_dim]`` for all heads.
        rotary_dim: dims of each head of q and k that are rotated, even; 0: none.
        rope_base: of the rotation, see ``lasp._core.rotary``.
        scale: of the output; None: ``head_dim ** -0.5``.
        norm_groups: the output norm takes the mean over each of so many groups of heads; 1: over
            all heads.
        norm_eps: of the norms of this layer.
        gate: of the output; ``none`` has no ``W_gate``.
        gate_first: ``norm(o * gate(W_gate x))``, the gate under the norm.
        qkv_bias: whether ``W_qkv`` has a bias.
        gate_bias: likewise.
        out_bias: likewise.
        rope_scaling: of the rotation, see :class:`lasp.RopeScaling`; None: it is not scaled.

    Raises:
        ValueError: naming the field.
    """

    activation: Activation = "silu"
    qk_norm: bool = False
    rotary_dim: int = 0
    rope_base: float = 10_000.0
    scale: float | None = 1.0
    norm_groups: int = 1
    norm_eps: float = 1e-6
    gate: Gate = "sigmoid"
    gate_first: bool = False
    qkv_bias: bool = False
    gate_bias: bool = False
    out_bias: bool = False
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check_one_of(Activation, activation=self.activation)
        check_one_of(Gate, gate=self.gate)
        names = ("qk_norm", "gate_first", "qkv_bias", "gate_bias", "out_bias")
        check_flags(**{name: getattr(self, name) for name in names})
        check_positive(norm_eps=self.norm_eps)
        check_even("rotary_dim", self.rotary_dim)
        check_rotation(self.rope_base, self.rope_scaling)
        if self.scale is not None:
            check_finite(scale=self.scale)
        check_sizes(norm_groups=self.norm_groups)
        if self.gate == "none" and (self.gate_first or self.gate_bias):
            raise ValueError(
                "gate_first and gate_bias need a gate, got gate 'none': name one, or leave them out"
            )

    def check_heads(self, num_heads: int, head_dim: int, tp_size: int = 1) -> None:
        """Raise ValueError unless these heads, over ``tp_size`` ranks, fit the options."""
        check_sizes(num_heads=num_heads, head_dim=head_dim, tp_size=tp_size)
        check_rotary_dim(self.rotary_dim, head_dim)
        if num_heads % self.norm_groups:
            raise ValueError(
                f"norm_groups must divide {num_heads} heads, got {self.norm_groups}: a group is of"
                " whole heads"
            )
        if self.norm_groups > 1 and self.norm_groups % tp_size:
            raise ValueError(
                f"norm_groups must be 1 or divide over {tp_size} tensor-parallel ranks, got"
                f" {self.norm_groups}: choose a tensor_model_parallel_size that divides it"
            )

    def scale_of(self, head_dim: int) -> float:
        """The scale of heads of this size."""
        return head_dim**-0.5 if self.scale is None else self.scale


MINIMAX_OPTIONS = LightningOptions()
