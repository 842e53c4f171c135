"""One decoder layer of a hybrid model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from lasp.hybrid.config import HybridConfig
from lasp.hybrid.packing import PackedBatch
from lasp.layers.lightning_attention import LightningAttention
from moe_parallel import ExpertParallelMoE, MoEOutput, ParallelGroups, RoutingStats
from moe_parallel.experts.dense import DenseFFN
from ring.module import RingAttention


class LayerOutput(NamedTuple):
    """What a layer returns on one rank.

    Attributes:
        hidden: ``[T, hidden]``.
        aux_loss: as of :class:`moe_parallel.MoEOutput`; None without experts.
        stats: likewise.
    """

    hidden: Tensor
    aux_loss: Tensor | None
    stats: RoutingStats | None


class HybridLayer(nn.Module):
    """Attention of either kind, then experts or a dense MLP, with a residual around each."""

    def __init__(
        self,
        config: HybridConfig,
        layer_index: int,
        *,
        groups: ParallelGroups,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        residuals, hidden = config.residuals_or_deepnorm, config.hidden_size
        softmax = config.kinds[layer_index] == "*"
        self.post_norm = residuals.norm == "post"
        self.attention_residual = residuals.softmax if softmax else residuals.lightning
        self.mlp_residual = residuals.mlp
        self.groups = groups
        self.attention_norm = nn.RMSNorm(hidden, config.norm_eps, device=device, dtype=dtype)
        self.attention: LightningAttention | RingAttention
        if softmax:
            self.attention = _softmax_attention(config, device, dtype)
        else:
            self.attention = _lightning_attention(config, layer_index, device, dtype)
        self.moe_norm = nn.RMSNorm(hidden, config.norm_eps, device=device, dtype=dtype)
        self.moe: ExpertParallelMoE | None = None
        self.mlp: DenseFFN | None = None
        if config.moe is not None and config.has_experts(layer_index):
            self.moe = ExpertParallelMoE(
                config.moe, groups=groups.experts, device=device, dtype=dtype
            )
        elif config.dense is not None:
            self.mlp = DenseFFN(hidden, config.dense.ffn_size, device=device, dtype=dtype)
            self.mlp.reset_parameters(torch.Generator().manual_seed(layer_index))

    def forward(self, hidden: Tensor, batch: PackedBatch) -> LayerOutput:
        """``hidden`` [T, hidden] of this rank's tokens, through both sub-layers."""
        normed = self.attention_norm(hidden)
        attended = self.attention(normed, layout=batch.layout, cp_group=self.groups.cp)
        hidden = self.attention_residual.add(normed if self.post_norm else hidden, attended)
        normed = self.moe_norm(hidden)
        residual = normed if self.post_norm else hidden
        if self.mlp is not None:
            return LayerOutput(self.mlp_residual.add(residual, self.mlp(normed)), None, None)
        assert self.moe is not None
        experts: MoEOutput = self.moe(normed, token_order=batch.token_order)
        output = self.mlp_residual.add(residual, experts.output)
        return LayerOutput(output, experts.aux_loss, experts.stats)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, init_gain: float) -> None:
        """See :meth:`lasp.hybrid.HybridModel.reset_parameters`."""
        attention = self.attention
        if isinstance(attention, LightningAttention):
            size = attention.hidden_size
            # Laid out head by head: each of q, k, v is one matrix spread over the heads.
            qkv = attention.qkv_proj.weight.view(attention.num_heads, 3, attention.head_dim, size)
            for part, gain in enumerate((1.0, 1.0, init_gain)):
                drawn = qkv.new_empty(attention.num_heads * attention.head_dim, size)
                draw_xavier(drawn, gain, generator)
                qkv[:, part].copy_(drawn.view(attention.num_heads, attention.head_dim, size))
            if attention.output_gate is not None:
                draw_xavier(attention.output_gate.weight, 1.0, generator)
            draw_xavier(attention.out_proj.weight, init_gain, generator)
        else:
            draw_xavier(attention.q_proj.weight, 1.0, generator)
            draw_xavier(attention.k_proj.weight, 1.0, generator)
            draw_xavier(attention.v_proj.weight, init_gain, generator)
            draw_xavier(attention.o_proj.weight, init_gain, generator)
            if attention.output_gate is not None:
                draw_xavier(attention.output_gate.weight, 1.0, generator)
        # The expert layer draws from seeds of its own, so that its values do not depend on ep, etp.
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
        if self.moe is not None:
            self.moe.reset_parameters(seed, gain=init_gain)
        elif self.mlp is not None:
            self.mlp.reset_parameters(generator, gain=init_gain)
        for name, parameter in self.attention.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()


def _softmax_attention(
    config: HybridConfig, device: torch.device | str | None, dtype: torch.dtype | None
) -> RingAttention:
    heads = config.attention
    return RingAttention(
        config.hidden_size,
        heads.num_heads,
        heads.num_kv_heads,
        heads.head_dim,
        rotary_dim=heads.rotary_dim,
        rope_base=heads.rope_base,
        gated=heads.gated,
        device=device,
        dtype=dtype,
    )


def _lightning_attention(
    config: HybridConfig,
    layer_index: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> LightningAttention:
    heads = config.attention
    return LightningAttention(
        config.hidden_size,
        heads.num_heads,
        heads.head_dim,
        layer_index,
        config.num_decay_layers or config.num_layers,
        decay=config.decay,
        options=config.lightning,
        exchange=config.exchange,
        impl=config.lightning_impl,
        device=device,
        dtype=dtype,
    )


def draw_xavier(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill ``weight`` with numbers drawn on the host, whatever its device and dtype."""
    drawn = torch.empty(weight.shape)
    nn.init.xavier_uniform_(drawn, gain, generator)
    weight.copy_(drawn)
