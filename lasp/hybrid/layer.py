"""One decoder layer of a hybrid model."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp.generation.attention import CachedLayer
from lasp.hybrid.config import HybridConfig
from lasp.hybrid.packing import PackedBatch
from lasp.layers.lightning_attention import LightningAttention
from lasp.layers.rms_norm import RMSNorm
from moe_parallel import ExpertParallelMoE, MoEOutput, ParallelGroups, RoutingStats, SymmetricMemory
from moe_parallel.experts.dense import DenseFFN
from ring.latent_module import MultiLatentAttention
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
        symmetric_memory: SymmetricMemory | None = None,
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
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(RMSNorm, hidden, config.norm_eps, impl=config.lightning_impl, **where)
        self.attention_norm = norm()
        self.attention: LightningAttention | RingAttention | MultiLatentAttention
        if softmax:
            self.attention = _softmax_attention(config, **where)
        else:
            self.attention = _lightning_attention(config, layer_index, **where)
        self.moe_norm = norm()
        self.moe: ExpertParallelMoE | None = None
        self.mlp: DenseFFN | None = None
        if config.moe is not None and config.has_experts(layer_index):
            self.moe = ExpertParallelMoE(
                config.moe, groups=groups.experts, symmetric_memory=symmetric_memory, **where
            )
        elif config.dense is not None:
            self.mlp = DenseFFN(hidden, config.dense.ffn_size, **where)
            self.mlp.reset_parameters(torch.Generator().manual_seed(layer_index))

    def forward(
        self, hidden: Tensor, batch: PackedBatch, cached: CachedLayer | None = None
    ) -> LayerOutput:
        """``hidden`` [T, hidden] of this rank's tokens, through both sub-layers.

        With ``cached`` the documents continue what a cache holds.
        """
        return self.through_mlp(self.through_attention(hidden, batch, cached), batch, cached)

    def through_attention(
        self, hidden: Tensor, batch: PackedBatch, cached: CachedLayer | None
    ) -> Tensor:
        """The first half of :meth:`forward`; ``lasp.hybrid.activations`` keeps less of each."""
        normed = self.attention_norm(hidden)
        if cached is None:
            attended = self.attention(normed, layout=batch.layout, cp_group=self.groups.cp)
        else:
            attended = cached.attend(self.attention, normed)
        return self.attention_residual.add(normed if self.post_norm else hidden, attended)

    def through_mlp(
        self, hidden: Tensor, batch: PackedBatch, cached: CachedLayer | None
    ) -> LayerOutput:
        """The second half: experts or the dense MLP."""
        normed = self.moe_norm(hidden)
        residual = normed if self.post_norm else hidden
        if self.mlp is not None:
            return LayerOutput(self.mlp_residual.add(residual, self.mlp(normed)), None, None)
        assert self.moe is not None
        experts: MoEOutput = self.moe(normed, token_order=batch.token_order)
        mixed = experts.output if cached is None else cached.combined(experts.output)
        output = self.mlp_residual.add(residual, mixed)
        return LayerOutput(output, experts.aux_loss, experts.stats)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, init_gain: float) -> None:
        """See :meth:`lasp.hybrid.HybridModel.reset_parameters`."""
        _reset_attention(self.attention, generator, init_gain)
        # The expert layer draws from seeds of its own, so that its values do not depend on ep, etp.
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator, device="cpu"))
        if self.moe is not None:
            self.moe.reset_parameters(seed, gain=init_gain)
        elif self.mlp is not None:
            self.mlp.reset_parameters(generator, gain=init_gain)


def _softmax_attention(config: HybridConfig, **where: Any) -> RingAttention | MultiLatentAttention:
    heads = config.attention
    shared = where | {"norm_eps": config.norm_eps, "rope_base": heads.rope_base}
    shared["rope_scaling"] = heads.rope_scaling
    if heads.latent is not None:
        shared |= asdict(heads.latent)
        return MultiLatentAttention(config.hidden_size, heads.num_heads, gate=heads.gated, **shared)
    return RingAttention(
        config.hidden_size, heads.num_heads, heads.num_kv_heads, heads.head_dim,
        rotary_dim=heads.rotary_dim,
        qk_norm=heads.qk_norm,
        gated=heads.gated,
        **shared,
    )  # fmt: skip


def _lightning_attention(
    config: HybridConfig, layer_index: int, **where: Any
) -> LightningAttention:
    heads, decay = config.attention, config.decay_or_rates
    return LightningAttention(
        config.hidden_size, heads.num_heads, heads.head_dim, layer_index,
        config.num_decay_layers or config.num_layers,
        decay=decay[layer_index] if isinstance(decay, Tensor) else decay,
        options=config.lightning,
        exchange=config.exchange,
        impl=config.lightning_impl,
        **where,
    )  # fmt: skip


def _reset_attention(
    attention: LightningAttention | RingAttention | MultiLatentAttention,
    generator: torch.Generator,
    init_gain: float,
) -> None:
    """Xavier values of the projections, values and output with ``init_gain``; no biases."""
    gains: dict[str, float]
    if isinstance(attention, LightningAttention):
        # Laid out head by head: each of q, k, v is one matrix spread over the heads.
        by_head = attention.qkv_proj.weight.unflatten(0, (attention.num_heads, 3, -1))
        for part, gain in enumerate((1.0, 1.0, init_gain)):
            drawn = by_head.new_empty(by_head[:, part].flatten(0, 1).shape)
            draw_xavier(drawn, gain, generator)
            by_head[:, part].copy_(drawn.view_as(by_head[:, part]))
        gains = {"output_gate": 1.0, "out_proj": init_gain}
    elif isinstance(attention, RingAttention):
        gains = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": init_gain, "o_proj": init_gain}
        gains["output_gate"] = 1.0
    else:
        names = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "g_proj")
        gains = {**dict.fromkeys(names, 1.0), "o_proj": init_gain}
    for name, gain in gains.items():
        linear = getattr(attention, name, None)
        if linear is not None:
            draw_xavier(linear.weight, gain, generator)
    if isinstance(attention, MultiLatentAttention):
        by_head = attention.kv_b_proj.weight.unflatten(0, (attention.num_heads, -1))
        by_head[:, -(attention.o_proj.in_features // attention.num_heads) :].mul_(init_gain)
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def draw_xavier(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    """Fill ``weight`` with numbers drawn on the host in float32, whatever its device and dtype."""
    drawn = torch.empty(weight.shape, device="cpu", dtype=torch.float32)
    nn.init.xavier_uniform_(drawn, gain, generator)
    weight.copy_(drawn)
