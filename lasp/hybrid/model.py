"""The hybrid decoder: lightning and softmax layers, experts and dense MLPs, in plain PyTorch.

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
from torch.nn import functional as F

from lasp._core.dtypes import wide_dtype
from lasp.hybrid.config import HybridConfig
from lasp.hybrid.layer import HybridLayer, draw_xavier
from lasp.hybrid.packing import PackedBatch
from moe_parallel import ParallelGroups, RoutingStats


class HybridOutput(NamedTuple):
    """What the decoder returns on one rank.

    Attributes:
        logits: ``[T, vocab]`` of this rank's tokens.
        aux_loss: this rank's share of the auxiliary losses of all layers, a scalar; its sum over
            the token group is the loss.
        stats: expert balance of each layer with experts over all ranks.
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
            ``config`` has neither experts nor dense MLPs.
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
        hidden, vocabulary = config.hidden_size, config.vocabulary
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
        self.head: nn.Linear | None = None
        if not vocabulary.tied:
            if vocabulary.float32_head:
                dtype = wide_dtype(dtype or torch.get_default_dtype())
            self.head = nn.Linear(hidden, config.vocab_size, bias=False, device=device, dtype=dtype)

    def forward(
        self, tokens: Tensor | None, batch: PackedBatch, *, inputs_embeds: Tensor | None = None
    ) -> HybridOutput:
        """Logits of this rank's tokens.

        Args:
            tokens: int64 ``[T]``, ``batch.layout.shard(pack, cp_rank)``; None with
                ``inputs_embeds``.
            batch: layout and router order, see :func:`pack_batch`.
            inputs_embeds: ``[T, hidden_size]`` in place of embedded tokens (of images, prompts that
                are learned), sharded as tokens are; ``vocabulary.embedding_scale`` is not applied.

        Returns:
            :class:`HybridOutput`.

        Gradients: to the parameters, and to ``inputs_embeds``.

        Raises:
            ValueError: unless one of ``tokens`` and ``inputs_embeds`` is given, of the layout's T
                tokens.
        """
        hidden = self._embedded(tokens, batch, inputs_embeds)
        aux_losses, stats = [], []
        for layer in self.layers:
            hidden, aux_loss, layer_stats = layer(hidden, batch)
            if aux_loss is not None:
                aux_losses.append(aux_loss)
                stats.append(layer_stats)
        logits = self._logits(self.final_norm(hidden))
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else logits.new_zeros(())
        return HybridOutput(logits, aux_loss, tuple(stats))

    def _embedded(
        self, tokens: Tensor | None, batch: PackedBatch, inputs_embeds: Tensor | None
    ) -> Tensor:
        """The residual stream before the first layer."""
        num_tokens = batch.layout.num_local_tokens
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError(
                "one of tokens and inputs_embeds must be given, got"
                f" {'neither' if tokens is None else 'both'}: put the embeddings of tokens into"
                " inputs_embeds where there are others beside"
            )
        if inputs_embeds is not None:
            shape, wanted = (num_tokens, self.config.hidden_size), self.embedding.weight.dtype
            if inputs_embeds.shape != shape or not inputs_embeds.is_floating_point():
                raise ValueError(
                    f"inputs_embeds must be floats of shape {shape}, got {inputs_embeds.dtype} of"
                    f" {tuple(inputs_embeds.shape)}: shard them with this batch's layout"
                )
            return inputs_embeds.to(wanted)
        assert tokens is not None
        if tokens.shape != (num_tokens,) or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 of shape ({num_tokens},), got {tokens.dtype} of"
                f" {tuple(tokens.shape)}: shard the pack with this batch's layout"
            )
        embedded: Tensor = self.embedding(tokens)
        scale = self.config.vocabulary.embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def _logits(self, normed: Tensor) -> Tensor:
        """The head, of the final norm's output."""
        vocabulary = self.config.vocabulary
        if vocabulary.logit_scale != 1.0:
            normed = normed * vocabulary.logit_scale
        if not vocabulary.float32_head:
            return self._head(normed)
        with torch.autocast(normed.device.type, enabled=False):
            return self._head(normed.to(wide_dtype(normed.dtype)))

    def _head(self, normed: Tensor) -> Tensor:
        if self.head is None:
            return F.linear(normed, self.embedding.weight.to(normed.dtype))
        logits: Tensor = self.head(normed)
        return logits

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
        if self.head is not None:
            draw_xavier(self.head.weight, 1.0, generator)
        for layer in self.decoder_layers():
            layer.reset_parameters(generator, self.config.residuals_or_deepnorm.init_gain)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()


class ParameterCount(NamedTuple):
    """Parameters of a model.

    Attributes:
        total: all.
        active: those that one token meets, embedding and head left out.
        active_with_vocabulary: those and all of embedding and head.
    """

    total: int
    active: int
    active_with_vocabulary: int


def count_parameters(config: HybridConfig) -> ParameterCount:
    """Build ``config`` on the meta device and count."""
    model = HybridModel(config, device="meta")
    experts = sum(parameter.numel() for _, parameter in model.expert_parameters())
    dense = sum(parameter.numel() for _, parameter in model.dense_parameters())
    vocabulary = model.embedding.weight.numel()
    vocabulary += 0 if model.head is None else model.head.weight.numel()
    met = dense
    if config.moe is not None:
        met += experts * config.moe.top_k // config.moe.num_experts
    return ParameterCount(dense + experts, met - vocabulary, met)
