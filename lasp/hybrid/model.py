"""The hybrid decoder: lightning and softmax layers, experts and dense MLPs, in plain PyTorch.

MiniMax-Text-01's shape: of every eight layers seven are lightning attention and the last is softmax
attention; every layer has a mixture of experts; residuals are DeepNorm post-norm, where the
residual is the *normed* input (``Residuals`` of the config has others)::

    x = norm(x);  x = alpha x + attention(x);  x = norm(x);  x = alpha x + experts(x)

Parameters are replicated over the token group (dp x cp) but for the experts, which are split over
ep x etp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lasp._core.checks import check_part
from lasp._core.dtypes import wide_dtype
from lasp.generation import CacheStep
from lasp.generation.attention import CachedLayer
from lasp.hybrid.config import HybridConfig
from lasp.hybrid.generative import GenerativeModel
from lasp.hybrid.head import Head, check_next_labels, scored_by
from lasp.hybrid.layer import HybridLayer, draw_xavier
from lasp.hybrid.multi_token import MultiTokenLayer
from lasp.hybrid.packing import PackedBatch
from lasp.hybrid.pretrained import PretrainedModel
from lasp.layers.rms_norm import RMSNorm
from moe_parallel import ParallelGroups, RoutingStats, SymmetricMemory
from moe_parallel.experts.shard import generator_of


class HybridOutput(NamedTuple):
    """What the decoder returns on one rank.

    Attributes:
        logits: ``[T, vocab]`` of this rank's tokens; with ``labels`` none of them, ``[0, vocab]``.
        aux_loss: this rank's share of the auxiliary losses of all layers, a scalar; its sum over
            the token group is the loss.
        stats: expert balance of each layer with experts over all ranks.
        mtp_logits: ``[T, vocab]`` for the token after the next, see ``lasp.hybrid.multi_token``;
            None where no ``next_tokens`` were given.
        loss: with ``labels`` their cross entropy, summed over this rank's tokens, in nats.
        mtp_loss: that of ``next_labels``.
    """

    logits: Tensor
    aux_loss: Tensor
    stats: tuple[RoutingStats, ...]
    mtp_logits: Tensor | None = None
    loss: Tensor | None = None
    mtp_loss: Tensor | None = None


class HybridModel(PretrainedModel, GenerativeModel):
    """The hybrid decoder on one rank.

    Args:
        config: the shape, equal on every rank.
        groups: this rank's process groups, of which cp, token, ep and etp are used; the local
            model if not given.
        symmetric_memory: of the EP x ETP block, for all layers: rows then travel to experts by copy
            engines, see :class:`moe_parallel.ExpertParallelMoE`; None: by all-to-all.
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
        symmetric_memory: SymmetricMemory | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_part("config", config, HybridConfig)
        check_part("groups", groups, ParallelGroups, optional=True)
        check_part("symmetric_memory", symmetric_memory, SymmetricMemory, optional=True)
        hidden, vocabulary = config.hidden_size, config.vocabulary
        if symmetric_memory is not None and config.moe is None:
            raise ValueError("symmetric_memory must be None where config.moe is: it carries rows")
        memory = {"symmetric_memory": symmetric_memory}
        if groups is None:
            groups = ParallelGroups(*[None] * len(ParallelGroups._fields))
        self.config = config
        self.groups = groups
        self.embedding = nn.Embedding(config.vocab_size, hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleList(
            HybridLayer(config, index, groups=groups, **memory, device=device, dtype=dtype)
            for index in range(config.num_layers)
        )
        self.final_norm = RMSNorm(
            hidden, config.norm_eps, impl=config.lightning_impl, device=device, dtype=dtype
        )
        self.mtp: MultiTokenLayer | None = None
        if config.mtp_loss_weight is not None:
            self.mtp = MultiTokenLayer(config, groups=groups, **memory, device=device, dtype=dtype)
        self.head: Head | None = None
        if not vocabulary.tied:
            if vocabulary.float32_head:
                dtype = wide_dtype(dtype or torch.get_default_dtype())
            self.head = Head(hidden, config.vocab_size, bias=False, device=device, dtype=dtype)
            self.head.keeps_dtype = vocabulary.float32_head  # type: ignore[assignment]

    def forward(
        self,
        tokens: Tensor | None,
        batch: PackedBatch,
        *,
        inputs_embeds: Tensor | None = None,
        next_tokens: Tensor | None = None,
        cached: CacheStep | None = None,
        labels: Tensor | None = None,
        next_labels: Tensor | None = None,
    ) -> HybridOutput:
        """Logits of this rank's tokens, or the loss without them.

        Args:
            tokens: int64 ``[T]``, ``batch.layout.shard(pack, cp_rank)``; None with
                ``inputs_embeds``.
            batch: layout and router order, see :func:`pack_batch`.
            inputs_embeds: ``[T, hidden_size]`` in place of embedded tokens (of images, prompts that
                are learned), sharded as tokens are; ``vocabulary.embedding_scale`` is not applied.
            next_tokens: int64 ``[T]``, what follows each token in its document, for multi-token
                prediction: :func:`lasp.hybrid.next_in_document` of ``tokens``. It must be given in
                training mode where the model has ``mtp_loss_weight``, on all ranks.
            cached: the documents continue what a cache holds, see :meth:`step`.
            labels: int64 ``[T]``, -100 where there is no target: for a loss without all logits, see
                :func:`lasp.hybrid.linear_cross_entropy`. Divide it by the targets of all ranks.
            next_labels: likewise, for ``next_tokens``.

        Gradients: to the parameters, and to ``inputs_embeds``.

        Raises:
            ValueError: unless one of ``tokens`` and ``inputs_embeds`` is given, of the layout's T
                tokens, ``next_tokens`` where they must be and can be, ``next_labels`` where there
                are both others; and for documents of ``attention.dense_len`` tokens.
        """
        check_part("batch", batch, PackedBatch)
        check_part("cached", cached, CacheStep, optional=True)
        self.config.attention.check_documents(batch.layout.document_lengths)
        self._check_next(next_tokens, batch)
        check_next_labels(labels, next_tokens, next_labels)
        hidden = self._embedded(tokens, batch, inputs_embeds)
        outputs = []
        memories: Iterable[CachedLayer | None] = repeat(None)
        if cached is not None:
            memories = (CachedLayer(cached, x, self.groups.token) for x in cached.cache.layers)
        for layer, memory in zip(self.layers, memories):
            hidden, *of_layer = layer(hidden, batch, memory)
            outputs.append(of_layer)
        if cached is not None:
            hidden = cached.wanted_rows(hidden)
        hidden, mtp_logits, mtp_loss = self.final_norm(hidden), None, None
        logits, loss = self._scored(hidden, labels)
        if self.mtp is not None and next_tokens is not None:
            embedded = self._embedded(next_tokens, batch, None)
            predicted, *of_layer = self.mtp(hidden, embedded, batch)
            outputs.append(of_layer)
            mtp_logits, mtp_loss = self._scored(predicted, next_labels)
        aux_losses = [aux_loss for aux_loss, _ in outputs if aux_loss is not None]
        aux_loss = torch.stack(aux_losses).sum() if aux_losses else logits.new_zeros(())
        stats = tuple(of_layer for _, of_layer in outputs if of_layer is not None)
        return HybridOutput(logits, aux_loss, stats, mtp_logits, loss, mtp_loss)

    def _check_next(self, next_tokens: Tensor | None, batch: PackedBatch) -> None:
        if next_tokens is None and self.mtp is not None and self.training:
            raise ValueError(
                "next_tokens must be given to train multi-token prediction, got None: pass"
                " lasp.hybrid.next_in_document of the tokens, or build the model with"
                " mtp_loss_weight None"
            )
        if next_tokens is not None and self.mtp is None:
            raise ValueError(
                "next_tokens must be None for a model without multi-token prediction, got a tensor:"
                " build the model with an mtp_loss_weight"
            )
        if next_tokens is not None:
            _check_tokens("next_tokens", next_tokens, batch)

    def _embedded(
        self, tokens: Tensor | None, batch: PackedBatch, inputs_embeds: Tensor | None
    ) -> Tensor:
        """The residual stream before the first layer."""
        if (tokens is None) == (inputs_embeds is None):
            raise ValueError(
                "one of tokens and inputs_embeds must be given, got"
                f" {'neither' if tokens is None else 'both'}: put the embeddings of tokens into"
                " inputs_embeds where there are others beside"
            )
        if inputs_embeds is not None:
            shape = (batch.layout.num_local_tokens, self.config.hidden_size)
            if inputs_embeds.shape != shape or not inputs_embeds.is_floating_point():
                raise ValueError(
                    f"inputs_embeds must be floats of shape {shape}, got {inputs_embeds.dtype} of"
                    f" {tuple(inputs_embeds.shape)}: shard them with this batch's layout"
                )
            return inputs_embeds.to(self.embedding.weight.dtype)
        assert tokens is not None
        _check_tokens("tokens", tokens, batch)
        embedded: Tensor = self.embedding(tokens)
        scale = self.config.vocabulary.embedding_scale
        return embedded if scale == 1.0 else embedded * scale

    def _scored(self, normed: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of the final norm's output; with labels their loss, and no logits."""
        vocabulary, weight = self.config.vocabulary, self.embedding.weight
        if vocabulary.logit_scale != 1.0:
            normed = normed * vocabulary.logit_scale
        if not vocabulary.float32_head:
            scored = scored_by(self.head, weight, normed, labels)
        else:
            with torch.autocast(normed.device.type, enabled=False):
                scored = scored_by(self.head, weight, normed.to(wide_dtype(normed.dtype)), labels)
        return (scored, None) if labels is None else (normed.new_empty(0, len(weight)), scored)

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
        generator = generator_of(seed)
        embedding = torch.empty(self.embedding.weight.shape, device="cpu", dtype=torch.float32)
        self.embedding.weight.copy_(embedding.normal_(generator=generator))
        if self.head is not None:
            draw_xavier(self.head.weight, 1.0, generator)
        for layer in self.decoder_layers():
            layer.reset_parameters(generator, self.config.residuals_or_deepnorm.init_gain)
        if self.mtp is not None:
            self.mtp.reset_parameters(generator, self.config.residuals_or_deepnorm.init_gain)
        for module in self.modules():
            if isinstance(module, nn.RMSNorm):
                module.reset_parameters()


def _check_tokens(name: str, tokens: Tensor, batch: PackedBatch) -> None:
    num_tokens = batch.layout.num_local_tokens
    check_part(name, tokens, Tensor)
    if tokens.shape != (num_tokens,) or tokens.dtype != torch.int64:
        raise ValueError(
            f"{name} must be int64 of shape ({num_tokens},), got {tokens.dtype} of"
            f" {tuple(tokens.shape)}: shard the pack with this batch's layout"
        )


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
