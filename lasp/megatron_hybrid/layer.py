"""The decoder layer that is lightning or softmax by its number, and specs of it."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor

from lasp.megatron import (
    ResidualNorm,
    groups_of,
    lightning_attention_spec,
    refuse_arguments,
)
from lasp.megatron_hybrid.config import (
    MINIMAX_TEXT_01,
    PRE_NORM,
    HybridConfig,
    ResidualScale,
    check_config,
    is_softmax,
)
from moe_parallel.megatron import ExpertParallelMoELayer, expert_parallel_moe_spec
from ring.megatron import ring_attention_spec


@dataclass
class HybridLayerSubmodules(TransformerLayerSubmodules):
    """Parts of :class:`HybridLayer`: ``self_attention`` is one of two, by layer number.

    Attributes:
        lightning: spec of the linear attention.
        softmax: spec of the softmax attention.
    """

    lightning: ModuleSpec | None = None
    softmax: ModuleSpec | None = None


class HybridLayer(TransformerLayer):
    """A decoder layer whose attention is lightning or softmax by its global layer number.

    ``post``: ``h = norm(x); y = alpha h + beta attention(h); g = norm(y); alpha g + beta mlp(g)``.
    ``pre``: the same with x and y for the residuals h and g.

    The MoE layer gets the process groups of this layer in every Megatron version, and the token
    order of a :class:`lasp.megatron.PackedSequence`.

    Args:
        config: Megatron's.
        submodules: the parts.
        layer_number: from 1, within the pipeline stage, as TransformerBlock passes it.
        pg_collection: process groups; of the parallel state if None.
        vp_stage: virtual pipeline stage.
        pattern: see :func:`is_softmax`.
        hybrid: the rest.
        optional: what a Megatron version passes besides.

    Raises:
        ValueError: for options that are not supported, of this layer or its parts.
    """

    # Megatron's arguments of a layer, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        *,
        pattern: str = "7:1",
        hybrid: HybridConfig = PRE_NORM,
        **optional: Any,
    ) -> None:
        check_config(config)
        pp_group, *_ = groups_of(pg_collection, "hybrid layers", "pp", "tp", "cp")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        offset = get_transformer_layer_offset(config, vp_stage, pp_group.rank())
        self_is_softmax = is_softmax(pattern, offset + layer_number - 1)
        with_experts = config.num_moe_experts is not None
        parts = copy(submodules)
        parts.self_attention = submodules.softmax if self_is_softmax else submodules.lightning
        if with_experts:
            # Built below: TransformerLayer of 0.16 gives groups to Megatron's own MoELayer only.
            parts.mlp = IdentityOp
        super().__init__(
            config,
            parts,
            layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **optional,
        )
        if with_experts:
            self.mlp = build_module(submodules.mlp, config=config, pg_collection=pg_collection)
            self.mlp.set_layer_number(self.layer_number)
            self.is_moe_layer = True
        self.post_norm = hybrid.residual == "post"
        self.attention_scale = hybrid.softmax if self_is_softmax else hybrid.lightning
        self.mlp_scale = hybrid.mlp

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_context: object = None,
        inference_params: object = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """One layer over this rank's tokens ``[T, B, hidden]``; no context comes back."""
        refuse_arguments(
            "hybrid layers",
            context=context,
            padding_mask=padding_mask,
            rotary_pos_emb=rotary_pos_emb,
            inference_params=inference_params,
        )
        normed = self.input_layernorm(hidden_states)
        mixed = self.self_attention(
            normed,
            attention_mask,
            attention_bias=attention_bias,
            inference_context=inference_context,
            packed_seq_params=packed_seq_params,
        )
        residual = normed if self.post_norm else hidden_states
        hidden_states = _add(residual, mixed, self.attention_scale)

        normed = self.pre_mlp_layernorm(hidden_states)
        if isinstance(self.mlp, ExpertParallelMoELayer):
            order = getattr(packed_seq_params, "token_order", None)
            mixed = self.mlp(normed, token_order=order)
        else:
            mixed = self.mlp(normed)
        residual = normed if self.post_norm else hidden_states
        return _add(residual, mixed, self.mlp_scale), None


def _add(residual: Tensor, part: tuple[Tensor, Tensor | None], scale: ResidualScale) -> Tensor:
    output, bias = part
    if bias is not None:
        output = output + bias
    return scale.alpha * residual + scale.beta * output


def hybrid_layer_spec(
    config: TransformerConfig | None = None,
    pattern: str = "7:1",
    hybrid: HybridConfig = PRE_NORM,
) -> ModuleSpec:
    """One spec for every layer: each picks its attention by its global number.

    Args:
        config: Megatron's; with ``num_moe_experts`` None the MLP is dense. None: experts.
        pattern: see :func:`is_softmax`.
        hybrid: the rest.
    """
    is_softmax(pattern, 0)
    dense = config is not None and config.num_moe_experts is None
    if dense:
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        mlp = ModuleSpec(module=MLP, submodules=linears)
    else:
        mlp = expert_parallel_moe_spec(init_gain=hybrid.expert_init_gain)
    return ModuleSpec(
        module=HybridLayer,
        submodules=HybridLayerSubmodules(
            input_layernorm=ResidualNorm,
            pre_mlp_layernorm=ResidualNorm,
            mlp=mlp,
            lightning=lightning_attention_spec(decay=hybrid.decay),
            softmax=ring_attention_spec(rotary_dim=hybrid.rotary_dim, rope_base=hybrid.rope_base),
        ),
        params={"pattern": pattern, "hybrid": hybrid},
    )


def hybrid_block_spec(
    config: TransformerConfig,
    pattern: str = "7:1",
    vp_stage: int | None = None,
    *,
    hybrid: HybridConfig = PRE_NORM,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and a final norm, for GPTModel or TransformerBlock.

    Args:
        config: Megatron's.
        pattern: see :func:`is_softmax`.
        vp_stage: virtual pipeline stage, as GPTModel gets it.
        hybrid: residuals, positions and decay.
        pp_rank: pipeline stage; of the parallel state if None.

    Raises:
        ValueError: for options that hybrid layers do not support.
    """
    check_config(config)
    if pp_rank is None:
        pp_rank = groups_of(None, "hybrid layers", "pp")[0].rank()
    layers = get_num_layers_to_build(config, vp_stage, pp_rank)
    spec = hybrid_layer_spec(config, pattern, hybrid)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=ResidualNorm)


minimax_layer_spec = hybrid_layer_spec(hybrid=MINIMAX_TEXT_01)
