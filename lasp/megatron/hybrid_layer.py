"""The decoder layer that is lightning or softmax by its number, and specs of it."""

from __future__ import annotations

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

from lasp.hybrid import is_softmax
from lasp.megatron.checks import groups_of
from lasp.megatron.experts.layer import expert_parallel_moe_spec
from lasp.megatron.hybrid_options import (
    PRE_NORM,
    HybridOptions,
    check_config,
    minimax_options,
    softmax_layers,
)
from lasp.megatron.lightning import lightning_attention_spec
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import cut_of_training_loop
from lasp.megatron.residual import ScaledLayer
from lasp.megatron.ring import ring_attention_spec


@dataclass
class HybridTransformerLayerSubmodules(TransformerLayerSubmodules):
    """Parts of :class:`HybridTransformerLayer`: ``self_attention`` is one of two, by layer number.

    Attributes:
        lightning: spec of the linear attention.
        softmax: spec of the softmax attention.
    """

    lightning: ModuleSpec | None = None
    softmax: ModuleSpec | None = None


class HybridTransformerLayer(ScaledLayer):
    """A :class:`ScaledLayer` whose attention is lightning or softmax by its global layer number.

    Args:
        config: Megatron's.
        submodules: the parts.
        layer_number: from 1, within the pipeline stage, as TransformerBlock passes it.
        pg_collection: process groups; of the parallel state if None.
        vp_stage: virtual pipeline stage.
        pattern: see :func:`softmax_layers`; None: that of ``config.linear_attention_freq``.
        hybrid: the rest.
        optional: what a Megatron version passes besides.

    Raises:
        ValueError: for options that are not supported, of this layer or its parts.
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
        pattern: str | None = None,
        hybrid: HybridOptions = PRE_NORM,
        **optional: Any,
    ) -> None:
        check_config(config)
        pp_group, *_ = groups_of(pg_collection, "hybrid layers", "pp", "tp", "cp")
        offset = get_transformer_layer_offset(config, vp_stage, pp_group.rank())
        softmax = softmax_layers(config, pattern, config.num_layers)[offset + layer_number - 1]
        parts = copy(submodules)
        parts.self_attention = submodules.softmax if softmax else submodules.lightning
        super().__init__(
            config,
            parts,
            layer_number,
            pg_collection,
            vp_stage=vp_stage,
            residual=hybrid.residual,
            attention_scale=hybrid.softmax if softmax else hybrid.lightning,
            mlp_scale=hybrid.mlp,
            packed_cut=hybrid.packed_cut,
            **optional,
        )


def hybrid_layer_spec(
    config: TransformerConfig | None = None,
    pattern: str | None = None,
    hybrid: HybridOptions = PRE_NORM,
) -> ModuleSpec:
    """One spec for every layer: each picks its attention by its global number.

    Args:
        config: Megatron's; with ``num_moe_experts`` None the MLP is dense. None: experts.
        pattern: "7:1", seven lightning layers, then a softmax layer; None: that of
            ``linear_attention_freq`` of the config that the layers are built with.
        hybrid: the rest.
    """
    if pattern is not None:
        is_softmax(pattern, 0)
    dense = config is not None and config.num_moe_experts is None
    if dense:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = ModuleSpec(module=MLP, submodules=linears)
    else:
        mlp = expert_parallel_moe_spec(init_gain=hybrid.expert_init_gain, options=hybrid.experts)
    return ModuleSpec(
        module=HybridTransformerLayer,
        submodules=HybridTransformerLayerSubmodules(
            input_layernorm=ResidualNorm,
            pre_mlp_layernorm=ResidualNorm,
            mlp=mlp,
            lightning=lightning_attention_spec(
                decay=hybrid.decay,
                impl=hybrid.impl,
                exchange=hybrid.exchange,
                packed_cut=hybrid.packed_cut,
            ),
            softmax=ring_attention_spec(
                rotary_dim=hybrid.rotary_dim,
                rope_base=hybrid.rope_base,
                packed_cut=hybrid.packed_cut,
            ),
        ),
        params={"pattern": pattern, "hybrid": hybrid},
    )


def hybrid_block_spec(
    config: TransformerConfig,
    pattern: str | None = None,
    vp_stage: int | None = None,
    *,
    hybrid: HybridOptions = PRE_NORM,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and a final norm, for GPTModel or TransformerBlock.

    Args:
        config: Megatron's.
        pattern: must be that of ``config.linear_attention_freq``, if both are given; see
            :func:`softmax_layers`.
        vp_stage: virtual pipeline stage, as GPTModel gets it.
        hybrid: residuals, positions and decay.
        pp_rank: pipeline stage; of the parallel state if None.

    Raises:
        ValueError: for options that hybrid layers do not support.
    """
    check_config(config)
    softmax_layers(config, pattern, config.num_layers)
    if pp_rank is None:
        pp_rank = groups_of(None, "hybrid layers", "pp")[0].rank()
    layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    spec = hybrid_layer_spec(config, pattern, hybrid)
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
        hybrid = minimax_options(config.num_layers, cut_of_training_loop())
        parts = submodules or hybrid_layer_spec(config, hybrid=hybrid).submodules
        pattern = "7:1" if config.linear_attention_freq is None else None
        super().__init__(config, parts, *args, pattern=pattern, hybrid=hybrid, **optional)


# Megatron's --spec imports an object, before there is a config.
minimax_layer_spec = ModuleSpec(module=MiniMaxLayer)
