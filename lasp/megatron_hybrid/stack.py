"""The hybrid model in the form of Megatron's HybridModel, from megatron-core 0.18 on.

    HybridModel(config, hybrid_stack_spec(pattern), hybrid_layer_pattern=pattern, ...)

Behind Megatron's symbols are ours: ``G`` lightning attention, ``*`` ring attention, ``E`` experts,
``-`` dense MLP. Each is a layer of its own: seven lightning layers with experts and one softmax
layer with experts are ``"GE" * 7 + "*E"``, and ``config.num_layers`` is 16.
"""

from __future__ import annotations

from typing import Any

import megatron.core
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from lasp.megatron import ResidualNorm, lightning_attention_spec
from lasp.megatron_hybrid.config import MINIMAX_TEXT_01, PRE_NORM, HybridConfig, ResidualScale
from lasp.megatron_hybrid.residual import ScaledLayer
from moe_parallel.megatron import expert_parallel_moe_spec
from ring.megatron import ring_attention_spec

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
except ModuleNotFoundError as error:
    raise ImportError(
        f"megatron-core must be >= 0.18 for HybridModel, got {megatron.core.__version__}: use"
        " lasp.megatron_hybrid.hybrid_block_spec with GPTModel"
    ) from error


class LocalHybridStack(HybridStack):
    """Megatron's HybridStack, whose final norm is TransformerEngine's, with ours."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        post_layer_norm: bool = True,
        **rest: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, **rest)
        self.post_layer_norm = post_layer_norm
        if post_layer_norm and self.post_process:
            self.final_norm = ResidualNorm(config, config.hidden_size, eps=config.layernorm_epsilon)


def hybrid_stack_spec(pattern: str, *, hybrid: HybridConfig = PRE_NORM) -> ModuleSpec:
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
        decay=hybrid.decay, decay_layers=mixers, impl=hybrid.impl, exchange=hybrid.exchange
    )
    softmax = ring_attention_spec(rotary_dim=hybrid.rotary_dim, rope_base=hybrid.rope_base)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = expert_parallel_moe_spec(init_gain=hybrid.expert_init_gain, options=hybrid.experts)
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            gdn_layer=_layer(hybrid, hybrid.lightning, self_attention=lightning),
            attention_layer=_layer(hybrid, hybrid.softmax, self_attention=softmax),
            mlp_layer=_layer(hybrid, hybrid.mlp, mlp=ModuleSpec(module=MLP, submodules=linears)),
            moe_layer=_layer(hybrid, hybrid.mlp, mlp=experts),
        ),
    )


def _layer(hybrid: HybridConfig, scale: ResidualScale, **part: ModuleSpec) -> ModuleSpec:
    """A layer of one part, with its norm."""
    norm = "input_layernorm" if "self_attention" in part else "pre_mlp_layernorm"
    return ModuleSpec(
        module=ScaledLayer,
        submodules=TransformerLayerSubmodules(**part, **{norm: ResidualNorm}),
        params={"residual": hybrid.residual, "attention_scale": scale, "mlp_scale": scale},
    )


minimax_stack_spec = hybrid_stack_spec(("GE" * 7 + "*E") * 10, hybrid=MINIMAX_TEXT_01)
