"""Softmax attention layer over a packed batch cut across ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.checks import check_flags, check_positive, check_sizes
from lasp._core.rotary import RopeScaling, check_rotary_dim, check_rotation, rotary_table, rotated
from lasp.sequence.layout import SequenceLayout
from ring.attention import checked_window, ring_attention
from ring.blocks.registry import check_block
from ring.torch_ops import checked_positions


class RingAttention(nn.Module):
    """Grouped-query softmax attention with rotary positions: projections around the operator.

    Equation: ``o_proj(ring_attention(rope(q_proj x), rope(k_proj x), v_proj x))``, no biases,
    score scale 1 / sqrt(head_dim); if ``gated``, ``o_proj(sigmoid(output_gate x) * ...)``; with
    ``qk_norm``, ``rope(q_norm(q_proj x))`` and so for keys.
    Parameters are named, shaped and laid out as in Hugging Face's models (``q_proj.weight
    [num_heads * head_dim, hidden_size]``, ...), so that weights load as they are. They are
    replicated over the context-parallel group: each rank's gradients cover its own tokens and must
    be summed over the group.

    Args:
        hidden_size: width of the residual stream.
        num_heads: Hq.
        num_kv_heads: Hkv, divides ``num_heads``.
        head_dim: D.
        rotary_dim: dims of each head that are rotated, even; MiniMax-01: D / 2; 0: none (NoPE).
        rope_base: 10,000 in MiniMax-01's pre-training, 10,000,000 at 1M context.
        rope_scaling: of the rotation, see :class:`lasp.RopeScaling`; None: it is not scaled.
        qk_norm: whether an RMSNorm over the dims of each head, with one weight for all query heads
            and one for all key heads, comes before the rotation (Qwen3).
        norm_eps: of these norms.
        gated: a sigmoid gate on every output of every head (MiniCPM-SALA).
        causal: a token sees itself and what comes before it in its document; else all of it.
        window: ``(left, right)``, tokens before and after itself that a token sees at most; -1: no
            limit, None: neither.
        sinks: whether heads have learnable sinks, the parameter ``sinks [num_heads]``, 0 at first.
        block: attention kernel, see :func:`ring.blocks.registry.resolve_block`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if a size is below 1, the heads do not divide, ``rotary_dim`` or ``window`` does
            not fit or ``block`` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rotary_dim: int,
        rope_base: float = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        gated: bool = False,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        sinks: bool = False,
        block: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_heads=num_heads)
        check_sizes(num_kv_heads=num_kv_heads, head_dim=head_dim)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide {num_heads} heads, got {num_kv_heads}")
        check_flags(qk_norm=qk_norm, gated=gated, causal=causal, sinks=sinks)
        check_positive(norm_eps=norm_eps)
        check_rotation(rope_base, rope_scaling)
        check_rotary_dim(rotary_dim, head_dim)
        check_block(block)
        self.hidden_size = hidden_size
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.rope_base, self.rope_scaling = rope_base, rope_scaling
        self.causal = causal
        self.window = checked_window(window, causal)
        self.block = block

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        self.q_proj = linear(hidden_size, num_heads * head_dim)
        self.k_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.v_proj = linear(hidden_size, num_kv_heads * head_dim)
        self.o_proj = linear(num_heads * head_dim, hidden_size)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(head_dim, eps=norm_eps, device=device, dtype=dtype) if qk_norm else None
            for _ in range(2)
        )
        self.output_gate = linear(hidden_size, num_heads * head_dim) if gated else None
        self.sinks: nn.Parameter | None = None
        if sinks:
            self.sinks = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))

    def forward(
        self,
        hidden: Tensor,
        *,
        layout: SequenceLayout | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens to their documents.

        Args:
            hidden: ``[T, hidden_size]``, the tokens of this rank; or ``[B, T, hidden_size]``, B
                rows under one layout of one document.
            layout: the same on every rank. None: the T tokens are one document, on one rank.
            cp_group: the ranks that hold the pack. None: one rank.

        Returns:
            Like ``hidden``.

        Gradients, Communication: of :func:`ring.attention.ring_attention`.

        Raises:
            ValueError: if ``hidden`` has another shape, and as the operator does.
        """
        output, _ = ring_attention(
            *self.project(hidden, checked_positions(hidden, self.hidden_size, layout, cp_group)),
            layout=layout,
            cp_group=cp_group,
            causal=self.causal,
            window=self.window,
            sinks=self.sinks,
            block=self.block,
        )
        return self.finish(hidden, output)

    def project(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[..., T, heads, head_dim]`` of tokens at these positions."""
        q, k, v = (
            projection(hidden).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_dim:
            how = (self.rotary_dim, self.rope_base, self.rope_scaling, q.dtype)
            table = rotary_table(position_ids, *how)
            q, k = rotated(q, *table), rotated(k, *table)
        return q, k, v

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The output of the layer, from that of the attention ``[..., T, Hq, head_dim]``."""
        attended = attended.flatten(-2)
        if self.output_gate is not None:
            attended = attended * torch.sigmoid(self.output_gate(hidden))
        projected: Tensor = self.o_proj(attended)
        return projected
