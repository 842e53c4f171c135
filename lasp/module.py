"""The lightning attention layer of MiniMax-01 in plain torch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lasp.attention import lightning_attention
from lasp.decay import Variant, decay_rates
from lasp.exchange import Exchange
from lasp.layout import SequenceLayout
from lasp.validation import Impl


class LightningAttention(nn.Module):
    """Token mixer: fused SiLU projection, lightning attention, norm, sigmoid gate, projection.

    ``q, k, v = split(SiLU(W_qkv x))``; ``o = lightning_attention(q, k, v)`` with scale 1 and no
    rotary embedding; ``y = W_out (sigmoid(W_gate x) * RMSNorm(o))``. The fused projection is laid
    out head by head (q, k, v of head 0, then of head 1, ...) and the norm spans all heads, so
    parameters have the names and shapes of MiniMax checkpoints.

    Args:
        hidden_size: width of the input and the output.
        num_heads: H.
        head_dim: key and value dim of a head; ``H * head_dim`` need not be ``hidden_size``.
        layer_index: index of the layer among all layers of the model, for the decay rates.
        num_layers: number of all layers of the model.
        decay: formula of the rates, see ``lasp.decay``.
        norm_eps: of the RMSNorm over all heads.
        exchange: how states cross ranks, see ``lasp.exchange``.
        impl: who computes, see :func:`lasp.lightning_attention`.
        device: where the parameters live.
        dtype: of the parameters. The rates are float32 and stay on the CPU, whatever the module is
            cast or moved to: the operator reads them there.

    Source: MiniMax-01, arXiv:2501.08313, section 2; transformers 5.23
    ``models/minimax/modeling_minimax.py``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        layer_index: int,
        num_layers: int,
        *,
        decay: Variant = "minimax",
        norm_eps: float = 1e-6,
        exchange: Exchange = "all_gather",
        impl: Impl = "eager",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.exchange: Exchange = exchange
        self.impl: Impl = impl
        inner_size = num_heads * head_dim
        self.qkv_proj = nn.Linear(
            hidden_size, 3 * inner_size, bias=False, device=device, dtype=dtype
        )
        self.output_gate = nn.Linear(
            hidden_size, inner_size, bias=False, device=device, dtype=dtype
        )
        self.norm = nn.RMSNorm(inner_size, eps=norm_eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=False, device=device, dtype=dtype)
        self.rates = decay_rates(num_heads, layer_index, num_layers, decay)

    def forward(
        self,
        hidden: Tensor,
        *,
        layout: SequenceLayout | None = None,
        cp_group: dist.ProcessGroup | None = None,
        initial_state: Tensor | None = None,
    ) -> Tensor:
        """Mix the tokens of each document.

        Args:
            hidden: ``[T, hidden_size]``, this rank's tokens of the pack, or ``[B, T, hidden_size]``
                for rows of one document each.
            layout: see :func:`lasp.lightning_attention`, which also gives the final states.
            cp_group: likewise.
            initial_state: likewise, ``[N or B, H, head_dim, head_dim]``.

        Returns:
            As ``hidden``.

        Communication: that of :func:`lasp.lightning_attention`.
        """
        if hidden.dim() not in (2, 3) or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden must be [T, {self.hidden_size}] or [B, T, {self.hidden_size}], got"
                f" {tuple(hidden.shape)}"
            )
        qkv = F.silu(self.qkv_proj(hidden)).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        q, k, v = qkv.split(self.head_dim, dim=-1)
        mixed = lightning_attention(
            q,
            k,
            v,
            self.rates,
            layout=layout,
            cp_group=cp_group,
            initial_state=initial_state,
            exchange=self.exchange,
            impl=self.impl,
            output_final_state=False,
        ).output
        gated = torch.sigmoid(self.output_gate(hidden)) * self.norm(mixed.flatten(-2))
        projected: Tensor = self.out_proj(gated)
        return projected
