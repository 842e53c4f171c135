"""The decoder layer that is lightning or softmax by its number, and specs of it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from lasp._core.checks import check_part
from lasp.hybrid.config import HybridConfig
from lasp.megatron.checks import groups_of
from lasp.megatron.experts.config import ExpertOptions
from lasp.megatron.experts.layer import expert_parallel_moe_spec
from lasp.megatron.hybrid_config import check_same_model, hybrid_of
from lasp.megatron.hybrid_options import check_block
from lasp.megatron.lightning import lightning_attention_spec
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import PackedCut, cut_of_training_loop
from lasp.megatron.residual import ScaledLayer
from lasp.megatron.ring import ring_attention_spec
from lasp.megatron.ring_latent import ring_latent_attention_spec
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory


@dataclass
class HybridTransformerLayerSubmodules(TransformerLayerSubmodules):
    """Parts of :class:`HybridTransformerLayer`, which takes two of these by its layer number.

    Attributes:
        lightning: spec of the linear attention.
        softmax: spec of the softmax attention.
        experts: spec of the experts, of layers that have them; ``mlp`` is the dense one.
    """

    lightning: ModuleSpec | None = None
    softmax: ModuleSpec | None = None
    experts: ModuleSpec | None = None


class HybridTransformerLayer(ScaledLayer):
    """A :class:`ScaledLayer` whose attention is lightning or softmax by its global layer number.

    Args:
        config: Megatron's.
        submodules: the parts.
        layer_number: from 1, within the pipeline stage, as TransformerBlock passes it.
        pg_collection: process groups; of the parallel state if None.
        vp_stage: virtual pipeline stage.
        hybrid: the model.
        packed_cut: how Megatron's own packs are cut, see :data:`lasp.megatron.PackedCut`.
        activations: what is kept for the backward, see ``lasp.megatron.activations``.
        optional: what a Megatron version passes besides.

    Raises:
        ValueError: for options that are not supported, of this layer or its parts, and where
            ``config`` is of another model than ``hybrid``.
    """

    # Megatron's arguments of a layer, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridTransformerLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        *,
        hybrid: HybridConfig,
        packed_cut: PackedCut | None = None,
        activations: str = "none",
        **optional: Any,
    ) -> None:
        check_block(config)
        check_same_model(config, hybrid)
        pp_group, *_ = groups_of(pg_collection, "hybrid layers", "pp", "tp", "cp")
        offset = get_transformer_layer_offset(config, vp_stage, pp_group.rank())
        index = offset + layer_number - 1
        softmax = hybrid.kinds[index] == "*"
        parts = copy(submodules)
        parts.self_attention = submodules.softmax if softmax else submodules.lightning
        if hybrid.has_experts(index):
            parts.mlp = submodules.experts
        super().__init__(
            config,
            parts,
            layer_number,
            pg_collection,
            vp_stage=vp_stage,
            residuals=hybrid.residuals_or_deepnorm,
            is_softmax=softmax,
            packed_cut=packed_cut,
            activations=activations,
            **optional,
        )


def attention_specs(
    hybrid: HybridConfig, packed_cut: PackedCut | None, decay_layers: Sequence[int] | None = None
) -> tuple[ModuleSpec, ModuleSpec]:
    """Lightning and softmax attention of a hybrid model."""
    check_part("hybrid", hybrid, HybridConfig)
    lightning = lightning_attention_spec(
        decay=hybrid.decay_or_rates,
        options=hybrid.lightning,
        decay_layers=decay_layers or tuple(range(1, hybrid.num_layers + 1)),
        num_decay_layers=hybrid.num_decay_layers,
        impl=hybrid.lightning_impl,
        exchange=hybrid.exchange,
        packed_cut=packed_cut,
    )
    heads = hybrid.attention
    if heads.latent is not None:
        return lightning, ring_latent_attention_spec(packed_cut=packed_cut)
    softmax = ring_attention_spec(
        rotary_dim=heads.rotary_dim,
        rope_base=heads.rope_base,
        rope_scaling=heads.rope_scaling,
        dense_len=heads.dense_len,
        packed_cut=packed_cut,
    )
    return lightning, softmax


def dense_mlp_spec() -> ModuleSpec:
    """A dense MLP of plain torch."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(module=MLP, submodules=linears)


def experts_spec(hybrid: HybridConfig, symmetric_memory: SymmetricMemory | None) -> ModuleSpec:
    """The experts of a hybrid model that has some."""
    assert hybrid.moe is not None
    return expert_parallel_moe_spec(
        init_gain=hybrid.residuals_or_deepnorm.init_gain,
        options=ExpertOptions.of(hybrid.moe, symmetric_memory),
    )


def hybrid_layer_spec(
    hybrid: HybridConfig,
    *,
    packed_cut: PackedCut | None = None,
    symmetric_memory: SymmetricMemory | None = None,
    activations: str = "none",
) -> ModuleSpec:
    """One spec for every layer: each picks its attention by its global number.

    Args:
        hybrid: the model; it must be that of the config which the layers are built with, see
            :func:`lasp.megatron.hybrid_of`.
        packed_cut: how Megatron's own packs are cut over context-parallel ranks, see
            :data:`lasp.megatron.PackedCut`; None: they are refused there.
        symmetric_memory: through which the experts' rows travel, see
            :class:`moe_parallel.megatron.ExpertOptions`.
        activations: ``none``, ``softmax_outputs`` or ``attention_outputs``: what a layer keeps for
            its backward, see :func:`lasp.hybrid.keep_activations`; not beside
            ``config.recompute_granularity``.
    """
    lightning, softmax = attention_specs(hybrid, packed_cut)
    return ModuleSpec(
        module=HybridTransformerLayer,
        submodules=HybridTransformerLayerSubmodules(
            input_layernorm=ResidualNorm,
            pre_mlp_layernorm=ResidualNorm,
            mlp=dense_mlp_spec(),
            experts=experts_spec(hybrid, symmetric_memory) if hybrid.moe else None,
            lightning=lightning,
            softmax=softmax,
        ),
        params={"hybrid": hybrid, "packed_cut": packed_cut, "activations": activations},
    )


def hybrid_block_spec(
    config: TransformerConfig,
    hybrid: HybridConfig,
    vp_stage: int | None = None,
    *,
    pp_rank: int | None = None,
    packed_cut: PackedCut | None = None,
    symmetric_memory: SymmetricMemory | None = None,
    activations: str = "none",
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and a final norm, for GPTModel or TransformerBlock.

    Args:
        config: Megatron's.
        hybrid: the model, the same as ``config``, see :func:`lasp.megatron.hybrid_of`.
        vp_stage: virtual pipeline stage, as GPTModel gets it.
        pp_rank: pipeline stage; of the parallel state if None.
        packed_cut: see :func:`hybrid_layer_spec`.
        symmetric_memory: likewise.
        activations: likewise.

    Raises:
        ValueError: for options that hybrid layers do not support, or of another model.
    """
    check_block(config)
    check_same_model(config, hybrid)
    if pp_rank is None:
        pp_rank = groups_of(None, "hybrid layers", "pp")[0].rank()
    layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    spec = hybrid_layer_spec(
        hybrid,
        packed_cut=packed_cut,
        symmetric_memory=symmetric_memory,
        activations=activations,
    )
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=ResidualNorm)


class MiniMaxLayer(HybridTransformerLayer):
    """MiniMax-Text-01's layer in a model of ``config.num_layers`` layers, its parts included.

    ``config.linear_attention_freq`` says which layers are softmax attention: 8 in MiniMax-Text-01.
    In Megatron's training loop packs are cut as its arguments say, see
    :func:`lasp.megatron.cut_of_training_loop`.
    With ``config.num_moe_experts`` None the MLP is dense. The final norm of a model built of this
    layer's spec is Megatron's own; its torch norm refuses sequence parallelism. For tensor parallel
    ranks without TransformerEngine or Apex take :func:`hybrid_block_spec`.

    Args:
        config: Megatron's.
        submodules: the parts; None: those of :func:`hybrid_layer_spec`.
        optional: see :class:`HybridTransformerLayer`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridTransformerLayerSubmodules | None = None,
        *args: Any,
        **optional: Any,
    ) -> None:
        hybrid, cut = hybrid_of(config), cut_of_training_loop()
        parts = submodules or hybrid_layer_spec(hybrid, packed_cut=cut).submodules
        super().__init__(config, parts, *args, hybrid=hybrid, packed_cut=cut, **optional)


# Megatron's --spec imports an object, before there is a config.
minimax_layer_spec = ModuleSpec(module=MiniMaxLayer)
