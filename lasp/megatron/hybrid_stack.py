"""The hybrid model in the form of Megatron's HybridModel, from megatron-core 0.18 on.

    HybridModel(config, hybrid_stack_spec(pattern), hybrid_layer_pattern=pattern, ...)

Behind Megatron's symbols are ours: ``G`` lightning attention, ``*`` ring attention, ``E`` experts,
``-`` dense MLP. Each is a layer of its own: seven lightning layers with experts and one softmax
layer with experts are ``"GE" * 7 + "*E"``, and ``config.num_layers`` is 16.
"""

from __future__ import annotations

from typing import Any

import megatron.core
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lasp.megatron.checks import training_argument
from lasp.megatron.experts.layer import expert_parallel_moe_spec
from lasp.megatron.hybrid_options import (
    PRE_NORM,
    HybridOptions,
    ResidualScale,
    kinds_of,
    minimax_options,
    softmax_layers,
)
from lasp.megatron.lightning import lightning_attention_spec
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import cut_of_training_loop
from lasp.megatron.residual import ScaledLayer
from lasp.megatron.ring import ring_attention_spec

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
except ModuleNotFoundError as error:
    raise ImportError(
        f"megatron-core must be >= 0.18 for HybridModel, got {megatron.core.__version__}: use"
        " lasp.megatron.hybrid_block_spec with GPTModel"
    ) from error


class LocalHybridStack(HybridStack):
    """Megatron's HybridStack, whose final norm is TransformerEngine's, with ours.

    Args:
        config: Megatron's.
        submodules: the layers by symbol.
        pattern: of the whole model; that of HybridModel, or its decays would be of other layers.
        layer_type_list: symbols of this pipeline stage, from HybridModel.
        pp_layer_offset: layers before them, from HybridModel.
        post_layer_norm: whether there is a final norm.
        rest: what HybridModel passes besides.

    Raises:
        ValueError: if the stage is not of the pattern, or ``linear_attention_freq`` gives another.
    """

    # Megatron's arguments of a stack, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        pattern: str,
        layer_type_list: list[str],
        pp_layer_offset: int = 0,
        post_layer_norm: bool = True,
        **rest: Any,
    ) -> None:
        symbols, stage = pattern.replace("|", ""), "".join(layer_type_list)
        whole_model = len(symbols) == config.num_layers
        if not whole_model or symbols[pp_layer_offset:][: len(stage)] != stage:
            raise ValueError(
                f"pattern must be the hybrid_layer_pattern of the model, got {pattern!r}: the model"
                f" of {config.num_layers} layers has {stage!r} after layer {pp_layer_offset}"
            )
        mixers = "".join(symbol for symbol in symbols if symbol in "G*")
        if config.linear_attention_freq is not None:
            configured = kinds_of(softmax_layers(config, None, len(mixers)))
            if configured != mixers:
                raise ValueError(
                    f"config.linear_attention_freq must give the attention layers {mixers!r} of"
                    f" pattern {pattern!r}, got {config.linear_attention_freq}, which gives"
                    f" {configured!r}: set None, the pattern says it all"
                )
        super().__init__(
            config,
            submodules,
            layer_type_list=layer_type_list,
            pp_layer_offset=pp_layer_offset,
            post_layer_norm=False,
            **rest,
        )
        self.post_layer_norm = post_layer_norm
        if post_layer_norm and self.post_process:
            self.final_norm = ResidualNorm(config, config.hidden_size, eps=config.layernorm_epsilon)


class MiniMaxStack(LocalHybridStack):
    """MiniMax-Text-01's stack for the pattern of the model, its parts included.

    Residuals go by the number of attention layers, decays by their places; MiniMax-Text-01's
    pattern is ``"GEGEGEGEGEGEGE*E" * 10``. In Megatron's training loop packs are cut as its
    arguments say, see :func:`lasp.megatron.cut_of_training_loop`.

    Args:
        config: Megatron's.
        submodules: must be None.
        layer_type_list: symbols of this pipeline stage, from HybridModel.
        pg_collection: process groups.
        rest: what HybridModel passes besides.

    Raises:
        ValueError: if the pattern of the whole model cannot be seen: with pipeline stages only
            Megatron's training arguments have it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: None = None,
        *,
        layer_type_list: list[str],
        pg_collection: ProcessGroupCollection,
        **rest: Any,
    ) -> None:
        pattern: str | None = "".join(layer_type_list)
        if pg_collection.pp.size() > 1:
            pattern = training_argument("hybrid_layer_pattern")
        if pattern is None:
            raise ValueError(
                "hybrid_layer_pattern must be among Megatron's training arguments for"
                " minimax_stack_spec with pipeline stages, got none: give HybridModel"
                " hybrid_stack_spec(pattern, hybrid=minimax_options(its attention layers))"
            )
        mixers = sum(symbol in "G*" for symbol in pattern)
        spec = hybrid_stack_spec(pattern, hybrid=minimax_options(mixers, cut_of_training_loop()))
        super().__init__(
            config,
            spec.submodules,
            pattern=pattern,
            layer_type_list=layer_type_list,
            pg_collection=pg_collection,
            **rest,
        )


def hybrid_stack_spec(pattern: str, *, hybrid: HybridOptions = PRE_NORM) -> ModuleSpec:
    """Spec of the stack of a HybridModel, the model of :func:`hybrid_block_spec` part by part.

    Args:
        pattern: ``hybrid_layer_pattern`` of the model; ``|`` may cut it into pipeline stages. The
            decay of a lightning layer goes by its place among the attention layers.
        hybrid: residuals, positions and decay.

    Raises:
        ValueError: for layers that are neither of the four.
    """
    symbols = pattern.replace("|", "")
    if not symbols or not set(symbols) <= set("G*E-"):
        raise ValueError(
            f"pattern must be of the layers G, *, E and - and of |, got {pattern!r}: take other"
            " layers from Megatron's own stack spec; there is no MTP"
        )
    mixers = tuple(number for number, symbol in enumerate(symbols, 1) if symbol in "G*")
    lightning = lightning_attention_spec(
        decay=hybrid.decay,
        decay_layers=mixers,
        impl=hybrid.impl,
        exchange=hybrid.exchange,
        packed_cut=hybrid.packed_cut,
    )
    softmax = ring_attention_spec(
        rotary_dim=hybrid.rotary_dim, rope_base=hybrid.rope_base, packed_cut=hybrid.packed_cut
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = expert_parallel_moe_spec(init_gain=hybrid.expert_init_gain, options=hybrid.experts)
    return ModuleSpec(
        module=LocalHybridStack,
        params={"pattern": pattern},
        submodules=HybridStackSubmodules(
            gdn_layer=_layer(hybrid, hybrid.lightning, self_attention=lightning),
            attention_layer=_layer(hybrid, hybrid.softmax, self_attention=softmax),
            mlp_layer=_layer(hybrid, hybrid.mlp, mlp=ModuleSpec(module=MLP, submodules=linears)),
            moe_layer=_layer(hybrid, hybrid.mlp, mlp=experts),
        ),
    )


def _layer(hybrid: HybridOptions, scale: ResidualScale, **part: ModuleSpec) -> ModuleSpec:
    """A layer of one part, with its norm."""
    norm = "input_layernorm" if "self_attention" in part else "pre_mlp_layernorm"
    return ModuleSpec(
        module=ScaledLayer,
        submodules=TransformerLayerSubmodules(**part, **{norm: ResidualNorm}),
        params={
            "residual": hybrid.residual,
            "attention_scale": scale,
            "mlp_scale": scale,
            "packed_cut": hybrid.packed_cut,
        },
    )


# Megatron's --spec imports an object, before there is a pattern.
minimax_stack_spec = ModuleSpec(module=MiniMaxStack)
