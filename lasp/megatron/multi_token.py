"""Megatron's multi-token prediction with a layer of the hybrid model, for GPTModel."""

from __future__ import annotations

from dataclasses import fields

from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
    get_mtp_num_layers_to_build,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lasp.hybrid.config import HybridConfig
from lasp.megatron.hybrid_config import check_same_model
from lasp.megatron.hybrid_layer import attention_specs, dense_mlp_spec, experts_spec
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import PackedCut
from lasp.megatron.residual import ScaledLayer
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory

# The name of the layer within the prediction's, which newer versions changed.
LAYER = fields(MultiTokenPredictionLayerSubmodules)
INNER = next(f.name for f in LAYER if f.name in ("transformer_layer", "mtp_model_layer"))


def hybrid_mtp_spec(
    config: TransformerConfig,
    hybrid: HybridConfig,
    vp_stage: int | None = None,
    *,
    pp_rank: int | None = None,
    packed_cut: PackedCut | None = None,
    symmetric_memory: SymmetricMemory | None = None,
) -> MultiTokenPredictionBlockSubmodules | None:
    """``mtp_block_spec`` of a GPTModel: the layer of :class:`lasp.hybrid.HybridModel`'s prediction.

    Megatron embeds, rolls and computes the loss: its sum over tokens is divided by the tokens that
    have one after the next. It rolls rows as zigzag and packs as zigzag in every document; other
    layouts over ranks, and padding within a pack, are refused.

    Args:
        config: Megatron's, with ``mtp_num_layers=1``.
        hybrid: the model, whose ``mtp_loss_weight`` is ``config.mtp_loss_scaling_factor``.
        vp_stage: see :func:`lasp.megatron.hybrid_block_spec`.
        pp_rank: likewise.
        packed_cut: likewise.
        symmetric_memory: likewise.

    Returns:
        None on pipeline stages without the layer, and for a model without it.
    """
    check_same_model(config, hybrid)
    if not get_mtp_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank):
        return None
    _, softmax = attention_specs(hybrid, packed_cut)
    layer = ModuleSpec(
        module=ScaledLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ResidualNorm,
            self_attention=softmax,
            pre_mlp_layernorm=ResidualNorm,
            mlp=experts_spec(hybrid, symmetric_memory) if hybrid.moe else dense_mlp_spec(),
        ),
        params={
            "residuals": hybrid.residuals_or_deepnorm,
            "is_softmax": True,
            "packed_cut": packed_cut,
        },
    )
    prediction = ModuleSpec(
        module=MultiTokenPredictionLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=ResidualNorm,
            hnorm=ResidualNorm,
            layer_norm=ResidualNorm,
            eh_proj=ColumnParallelLinear,
            **{INNER: layer},
        ),
    )
    return MultiTokenPredictionBlockSubmodules(layer_specs=[prediction])
