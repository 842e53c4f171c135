"""The hybrid decoder: lightning and softmax layers with experts, in plain PyTorch.

MiniMax-Text-01's shape: of every eight layers seven are lightning attention and the last is softmax
attention; every layer has a mixture of experts; residuals are DeepNorm post-norm, where the
residual is the *normed* input (``Residuals`` of the config has others)::

    x = norm(x);  x = alpha x + attention(x);  x = norm(x);  x = alpha x + experts(x)

Parameters are replicated over the token group (dp x cp) but for the experts, which are split over
ep x etp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lasp.hybrid.config import HybridConfig
from lasp.hybrid.packing import PackedBatch
from lasp.layers.lightning_attention import LightningAttention
from moe_parallel import ExpertParallelMoE, MoEConfig, MoEOutput, ParallelGroups, RoutingStats
from ring.module import RingAttention


class HybridLayer(nn.Module):
    """One decoder layer: attention of either kind, then experts, with a residual around each."""

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
        moe, heads, residuals = _experts_of(config), config.attention, config.residuals_or_deepnorm
        hidden, softmax = moe.hidden_size, config.kinds[layer_index] == "*"
        self.post_norm = residuals.norm == "post"
        self.attention_residual = residuals.softmax if softmax else residuals.lightning
        self.moe_residual = residuals.mlp
        self.groups = groups
        self.attention_norm = nn.RMSNorm(hidden, config.norm_eps, device=device, dtype=dtype)
        self.attention: LightningAttention | RingAttention
        if softmax:
            self.attention = RingAttention(
                hidden,
                heads.num_heads,
                heads.num_kv_heads,
                heads.head_dim,
                rotary_dim=heads.rotary_dim,
                rope_base=heads.rope_base,
                device=device,
                dtype=dtype,
            )
        else:
            self.attention = LightningAttention(
                hidden,
                heads.num_heads,
                heads.head_dim,
                layer_index,
                config.num_layers,
                decay=config.decay,
                exchange=config.exchange,
                impl=config.lightning_impl,
                device=device,
                dtype=dtype,
            )
        self.moe_norm = nn.RMSNorm(hidden, config.norm_eps, device=device, dtype=dtype)
        self.moe = ExpertParallelMoE(moe, groups=groups.experts, device=device, dtype=dtype)

    def forward(self, hidden: Tensor, batch: PackedBatch) -> MoEOutput:
        """``hidden`` [T, hidden] of this rank's tokens, through both sub-layers."""
        normed = self.attention_norm(hidden)
        attended = self.attention(normed, layout=batch.layout, cp_group=self.groups.cp)
        hidden = self.attention_residual.add(normed if self.post_norm else hidden, attended)
        normed = self.moe_norm(hidden)
        experts: MoEOutput = self.moe(normed, token_order=batch.token_order)
        residual = normed if self.post_norm else hidden
        # Not _replace(): in a graph torch 2.11 makes an empty tuple of it.
        output = self.moe_residual.add(residual, experts.output)
        return MoEOutput(output, experts.aux_loss, experts.stats)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, init_gain: float) -> None:
        """See :meth:`HybridModel.reset_parameters`."""
        attention = self.attention
        if isinstance(attention, LightningAttention):
            size = attention.hidden_size
            # Laid out head by head: each of q, k, v is one matrix spread over the heads.
            qkv = attention.qkv_proj.weight.view(attention.num_heads, 3, attention.head_dim, size)
            for part, gain in enumerate((1.0, 1.0, init_gain)):
                drawn = qkv.new_empty(attention.num_heads * attention.head_dim, size)
                _xavier(drawn, gain, generator)
                qkv[:, part].copy_(drawn.view(attention.num_heads, attention.head_dim, size))
            if attention.output_gate is not None:
                _xavier(attention.output_gate.weight, 1.0, generator)
            _xavier(attention.out_proj.weight, init_gain, generator)
        else:
            _xavier(attention.q_proj.weight, 1.0, generator)
            _xavier(attention.k_proj.weight, 1.0, generator)
            _xavier(attention.v_proj.weight, init_gain, generator)
            _xavier(attention.o_proj.weight, init_gain, generator)
        # The expert layer draws from seeds of its own, so that its values do not depend on ep, etp.
        seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
        self.moe.reset_parameters(seed, gain=init_gain)


class HybridOutput(NamedTuple):
    """What the decoder returns on one rank.

    Attributes:
        logits: ``[T, vocab]`` of this rank's tokens.
        aux_loss: this rank's share of the auxiliary losses of all layers, a scalar; its sum over
            the token group is the loss.
        stats: expert balance of each layer over all ranks.
    """

    logits: Tensor
    aux_loss: Tensor
    stats: tuple[RoutingStats, ...]


class HybridModel(nn.Module):
    """The hybrid decoder on one rank.

    Args:
        config: the shape, equal on every rank.
        groups: this rank's process groups, of which cp, token, ep and etp are used; the local
            model if not given.
        device: of the parameters; ``meta`` builds any size without memory.
        dtype: of the parameters but the routers' and the decay rates, which stay float32.

    Raises:
        ValueError: if experts or FFN do not divide by the groups, see ``ExpertParallelMoE``, or
            ``config`` has no experts.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        groups: ParallelGroups | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _experts_of(config).hidden_size
        if groups is None:
            groups = ParallelGroups(*[None] * len(ParallelGroups._fields))
        self.config = config
        self.groups = groups
        self.embedding = nn.Embedding(config.vocab_size, hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            HybridLayer(config, index, groups=groups, device=device, dtype=dtype)
            for index in range(config.num_layers)
        )
        self.final_norm = nn.RMSNorm(hidden, config.norm_eps, device=device, dtype=dtype)
        self.head = nn.Linear(hidden, config.vocab_size, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: Tensor, batch: PackedBatch) -> HybridOutput:
        """Logits of this rank's tokens.

        Args:
            tokens: int64 ``[T]``, ``batch.layout.shard(pack, cp_rank)``.
            batch: layout and router order, see :func:`pack_batch`.

        Returns:
            :class:`HybridOutput`.

        Raises:
            ValueError: if ``tokens`` has not the layout's T tokens.
        """
        if tokens.shape != (batch.layout.num_local_tokens,) or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 of shape ({batch.layout.num_local_tokens},), got"
                f" {tokens.dtype} of {tuple(tokens.shape)}: shard the pack with this batch's layout"
            )
        hidden = self.embedding(tokens)
        aux_losses, stats = [], []
        for layer in self.layers:
            hidden, aux_loss, layer_stats = layer(hidden, batch)
            aux_losses.append(aux_loss)
            stats.append(layer_stats)
        logits = self.head(self.final_norm(hidden))
        return HybridOutput(logits, torch.stack(aux_losses).sum(), tuple(stats))

    def decoder_layers(self) -> Iterator[HybridLayer]:
        """The layers, typed; wrapped ones as they are, with the attributes of what they wrap."""
        for layer in self.layers:
            yield cast("HybridLayer", layer)

    def expert_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that are split over ep x etp; all others are replicated."""
        for name, parameter in self.named_parameters():
            if ".moe.experts." in name:
                yield name, parameter

    def dense_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that every rank holds whole."""
        for name, parameter in self.named_parameters():
            if ".moe.experts." not in name:
                yield name, parameter

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Xavier initialisation, the same model for every parallel layout.

        Gain 1 for q, k and gates, ``init_gain`` for v, output projections and experts (DeepNet,
        arXiv:2203.00555). Drawn on the host in float32, so that device and dtype do not change it.
        """
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.empty(self.embedding.weight.shape)
        self.embedding.weight.copy_(embedding.normal_(generator=generator))
        _xavier(self.head.weight, 1.0, generator)
        for layer in self.decoder_layers():
            layer.reset_parameters(generator, self.config.residuals_or_deepnorm.init_gain)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()


def _xavier(weight: Tensor, gain: float, generator: torch.Generator) -> None:
    drawn = torch.empty(weight.shape)
    nn.init.xavier_uniform_(drawn, gain, generator)
    weight.copy_(drawn)


def _experts_of(config: HybridConfig) -> MoEConfig:
    if config.moe is None:
        raise ValueError("moe must be a MoEConfig, got None: dense MLPs are in Megatron alone")
    return config.moe


class ParameterCount(NamedTuple):
    """Parameters of a model: all, and those one token meets, embedding and head left out."""

    total: int
    active: int


def count_parameters(config: HybridConfig) -> ParameterCount:
    """Build ``config`` on the meta device and count."""
    model = HybridModel(config, device="meta")
    experts = sum(parameter.numel() for _, parameter in model.expert_parameters())
    dense = sum(parameter.numel() for _, parameter in model.dense_parameters())
    vocabulary = model.embedding.weight.numel() + model.head.weight.numel()
    moe = _experts_of(config)
    active = dense - vocabulary + experts * moe.top_k // moe.num_experts
    return ParameterCount(dense + experts, active)
