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
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lasp.hybrid.config import HybridConfig
from lasp.megatron.checks import training_argument
from lasp.megatron.hybrid_config import attention_of, check_same_model, hybrid_of
from lasp.megatron.hybrid_layer import attention_specs, dense_mlp_spec, experts_spec
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import PackedCut, cut_of_training_loop
from lasp.megatron.residual import ScaledLayer
from moe_parallel.dispatch.symmetric_memory import SymmetricMemory

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
        hybrid: the model.
        layer_type_list: symbols of this pipeline stage, from HybridModel.
        pp_layer_offset: layers before them, from HybridModel.
        post_layer_norm: whether there is a final norm.
        rest: what HybridModel passes besides.

    Raises:
        ValueError: if the stage is not of the pattern, or ``config`` of another model.
    """

    # Megatron's arguments of a stack, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        pattern: str,
        hybrid: HybridConfig,
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
        check_same_model(config, hybrid, symbols)
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
                " hybrid_stack_spec(pattern, hybrid_of(config, symbols=pattern))"
            )
        hybrid = hybrid_of(config, symbols=pattern)
        spec = hybrid_stack_spec(pattern, hybrid, packed_cut=cut_of_training_loop())
        super().__init__(
            config,
            spec.submodules,
            **spec.params,
            layer_type_list=layer_type_list,
            pg_collection=pg_collection,
            **rest,
        )


def hybrid_stack_spec(
    pattern: str,
    hybrid: HybridConfig,
    *,
    packed_cut: PackedCut | None = None,
    symmetric_memory: SymmetricMemory | None = None,
    activations: str = "none",
) -> ModuleSpec:
    """Spec of the stack of a HybridModel, the model of :func:`hybrid_block_spec` part by part.

    Args:
        pattern: ``hybrid_layer_pattern`` of the model; ``|`` may cut it into pipeline stages. The
            decay of a lightning layer goes by its place among the attention layers, which must be
            those of ``hybrid``.
        hybrid: the model; with experts if the pattern has an E, else without.
        packed_cut: see :func:`lasp.megatron.hybrid_layer_spec`.
        symmetric_memory: likewise.
        activations: likewise.

    Raises:
        ValueError: for layers that are neither of the four, or of another model.
    """
    symbols = _checked_symbols(pattern, hybrid)
    mixers = tuple(number for number, symbol in enumerate(symbols, 1) if symbol in "G*")
    lightning, softmax = attention_specs(hybrid, packed_cut, mixers)

    def layer(part: str, spec: ModuleSpec, is_softmax: bool = False) -> ModuleSpec:
        norm = "input_layernorm" if part == "self_attention" else "pre_mlp_layernorm"
        return ModuleSpec(
            module=ScaledLayer,
            submodules=TransformerLayerSubmodules(**{part: spec, norm: ResidualNorm}),
            params={
                "residuals": hybrid.residuals_or_deepnorm,
                "is_softmax": is_softmax,
                "packed_cut": packed_cut,
                "activations": activations,
            },
        )

    layers = {
        "gdn_layer": layer("self_attention", lightning),
        "attention_layer": layer("self_attention", softmax, is_softmax=True),
        "mlp_layer": layer("mlp", dense_mlp_spec()),
    }
    if hybrid.moe:
        layers["moe_layer"] = layer("mlp", experts_spec(hybrid, symmetric_memory))
    return ModuleSpec(
        module=LocalHybridStack,
        params={"pattern": pattern, "hybrid": hybrid},
        submodules=HybridStackSubmodules(**layers),
    )


def _checked_symbols(pattern: str, hybrid: HybridConfig) -> str:
    """The layers of a pattern; raise ValueError unless they are those of the hybrid model."""
    symbols = pattern.replace("|", "")
    if not symbols or not set(symbols) <= set("G*E-"):
        raise ValueError(
            f"pattern must be of the layers G, *, E and - and of |, got {pattern!r}: take other"
            " layers from Megatron's own stack spec; there is no MTP"
        )
    if ("E" in symbols) != (hybrid.moe is not None) or attention_of(symbols) != hybrid.kinds:
        raise ValueError(
            f"pattern must have the attention layers of the HybridConfig, {hybrid.kinds}, and E"
            f" {'where' if hybrid.moe else 'nowhere, as'} it has {'' if hybrid.moe else 'no '}"
            f"experts, got {pattern!r}: change one"
        )
    mlps = "".join("E" if hybrid.has_experts(n) else "-" for n in range(hybrid.num_layers))
    if hybrid.dense and "".join(symbol for symbol in symbols if symbol in "E-") != mlps:
        raise ValueError(
            f"pattern must have the MLPs of the HybridConfig, {mlps}, got {pattern!r}: change one"
        )
    return symbols


# Megatron's --spec imports an object, before there is a pattern.
minimax_stack_spec = ModuleSpec(module=MiniMaxStack)
