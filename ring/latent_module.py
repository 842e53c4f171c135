"""Multi-head latent attention layer over a packed batch cut across ranks."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.checks import (
    check_flags,
    check_part,
    check_positive,
    check_sizes,
    check_sizes_or_none,
)
from lasp._core.rotary import RopeScaling, check_even, check_rotation, rotary_table, rotated
from lasp.sequence.layout import SequenceLayout
from ring.attention import checked_window
from ring.blocks.registry import check_block
from ring.latent_attention import ring_latent_attention
from ring.torch_ops import checked_positions


class MultiLatentAttention(nn.Module):
    """Attention with keys and values of one latent a token, which is all that crosses ranks.

    Equations, with ``c, p`` the latent of a token and its key part for all heads::

        q    = q_b_proj norm(q_a_proj x), or q_proj x        heads of qk_nope_head_dim + P
        c, p = kv_a_proj_with_mqa x                          kv_lora_rank and P elements
        k, v = kv_b_proj norm(c), with rope(p) behind k      and the last P of q rotated
        y    = o_proj(attention(q, k, v)), or o_proj(sigmoid(g_proj x) * attention(q, k, v))

    P is ``qk_rope_head_dim``. Parameters are named, shaped and laid out as in Hugging Face's
    DeepSeek-V3 (``kv_b_proj.weight [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]``,
    ...). They are replicated over the context-parallel group: each rank's gradients must be summed
    over the group.

    Args:
        hidden_size: width of the residual stream.
        num_heads: H.
        kv_lora_rank: R, elements of the latent that heads are made of.
        qk_nope_head_dim: dims of a head's own part of queries and keys.
        qk_rope_head_dim: P, dims of the part that the keys of all heads share; 0: none.
        v_head_dim: dims of a value.
        q_lora_rank: width to which queries are compressed; None: they are not.
        rope_base: of the shared part's rotary positions; None: nothing is rotated (NoPE).
        rope_scaling: of that rotation and of the scores, for longer contexts; None: neither.
        rope_interleaved: whether pairs of the rotation are neighbours, as in DeepSeek's weights,
            and not half the dims apart.
        gate: whether the output is gated by a sigmoid of the input, a weight more (``g_proj``).
        norm_eps: of both norms.
        causal: a token sees itself and what comes before it in its document; else all of it.
        window: ``(left, right)``, see :func:`ring.ring_attention`.
        block: attention kernel, see :func:`ring.blocks.registry.resolve_block`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if a size is below 1, ``qk_rope_head_dim`` is odd, or ``window`` or ``block``
            does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        q_lora_rank: int | None = None,
        rope_base: float | None = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        rope_interleaved: bool = False,
        gate: bool = False,
        norm_eps: float = 1e-6,
        causal: bool = True,
        window: tuple[int, int] | None = None,
        block: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, num_heads=num_heads, kv_lora_rank=kv_lora_rank)
        check_sizes(qk_nope_head_dim=qk_nope_head_dim, v_head_dim=v_head_dim)
        check_sizes_or_none(q_lora_rank=q_lora_rank)
        check_even("qk_rope_head_dim", qk_rope_head_dim)
        check_positive(norm_eps=norm_eps)
        check_flags(rope_interleaved=rope_interleaved, gate=gate, causal=causal)
        if rope_base is None:
            check_part("rope_scaling", rope_scaling, RopeScaling, optional=True)
        else:
            check_rotation(rope_base, rope_scaling)
        check_block(block)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.kv_lora_rank, self.qk_rope_head_dim = kv_lora_rank, qk_rope_head_dim
        self.rope_base, self.rope_interleaved = rope_base, rope_interleaved
        self.rope_scaling, self.block = rope_scaling, block
        latent_factor = 1.0 if rope_scaling is None else rope_scaling.latent_factor
        self.scale = (qk_nope_head_dim + qk_rope_head_dim) ** -0.5 * latent_factor
        self.causal, self.window = causal, checked_window(window, causal)

        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        norm = partial(nn.RMSNorm, eps=norm_eps, device=device, dtype=dtype)
        q_width = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        if q_lora_rank is None:
            self.q_proj = linear(hidden_size, q_width)
        else:
            self.q_a_proj = linear(hidden_size, q_lora_rank)
            self.q_a_layernorm = norm(q_lora_rank)
            self.q_b_proj = linear(q_lora_rank, q_width)
        self.compresses_q = q_lora_rank is not None
        self.kv_a_proj_with_mqa = linear(hidden_size, kv_lora_rank + qk_rope_head_dim)
        self.kv_a_layernorm = norm(kv_lora_rank)
        self.kv_b_proj = linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim))
        self.o_proj = linear(num_heads * v_head_dim, hidden_size)
        self.g_proj = linear(hidden_size, num_heads * v_head_dim) if gate else None

    def forward(
        self,
        hidden: Tensor,
        *,
        layout: SequenceLayout | None = None,
        cp_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Attention of this rank's tokens to their documents.

        Args, results and errors are those of :meth:`ring.RingAttention.forward`; gradients and
        communication of :func:`ring.ring_latent_attention`.
        """
        output, _ = ring_latent_attention(
            *self.project(hidden, checked_positions(hidden, self.hidden_size, layout, cp_group)),
            self.expansion_weight,
            layout=layout,
            cp_group=cp_group,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            block=self.block,
        )
        return self.finish(hidden, output)

    @property
    def expansion_weight(self) -> Tensor:
        """``[H, qk_nope_head_dim + v_head_dim, R]``: what makes keys and values of a latent."""
        by_head: Tensor = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        return by_head

    def project(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``[..., T, H, qk_nope_head_dim + P]`` and latents ``[..., T, R + P]``."""
        q = self._queries(hidden).unflatten(-1, (self.num_heads, -1))
        widths = (self.kv_lora_rank, self.qk_rope_head_dim)
        c, shared = self.kv_a_proj_with_mqa(hidden).split(widths, dim=-1)
        if self.rope_base is not None and self.qk_rope_head_dim:
            table = rotary_table(
                position_ids, widths[1], self.rope_base, self.rope_scaling, q.dtype
            )
            own, turning = q.split((q.shape[-1] - widths[1], widths[1]), dim=-1)
            q = torch.cat((own, self._rotated(turning, table)), dim=-1)
            shared = self._rotated(shared.unsqueeze(-2), table).squeeze(-2)
        return q, torch.cat((self.kv_a_layernorm(c), shared), dim=-1)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The output of the layer, from that of the attention ``[..., T, H, v_head_dim]``."""
        attended = attended.flatten(-2)
        if self.g_proj is not None:
            attended = attended * self.g_proj(hidden).sigmoid()
        projected: Tensor = self.o_proj(attended)
        return projected

    def _queries(self, hidden: Tensor) -> Tensor:
        q: Tensor
        if self.compresses_q:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        else:
            q = self.q_proj(hidden)
        return q

    def _rotated(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """``[..., T, H, P]`` rotated; neighbours become halves, in queries and keys alike."""
        if self.rope_interleaved:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotated(x, *table)
