"""Hybrid decoder layers for Megatron-Core: lightning and softmax attention, experts or a dense MLP.

    GPTModel(config, hybrid_block_spec(config, "7:1"), ..., position_embedding_type="none")

or, where Megatron wants one static object, ``--spec lasp.megatron_hybrid minimax_layer_spec``.
"""

from lasp.megatron_hybrid.batch import pack_sequences, share_packs
from lasp.megatron_hybrid.config import MINIMAX_TEXT_01, HybridConfig, ResidualScale, is_softmax
from lasp.megatron_hybrid.convert import (
    load_plain_weights,
    plain_weights,
    to_megatron,
    to_plain,
)
from lasp.megatron_hybrid.layer import (
    HybridLayer,
    HybridLayerSubmodules,
    hybrid_block_spec,
    hybrid_layer_spec,
    minimax_layer_spec,
)

__all__ = [
    "MINIMAX_TEXT_01",
    "HybridConfig",
    "HybridLayer",
    "HybridLayerSubmodules",
    "ResidualScale",
    "hybrid_block_spec",
    "hybrid_layer_spec",
    "is_softmax",
    "load_plain_weights",
    "minimax_layer_spec",
    "pack_sequences",
    "plain_weights",
    "share_packs",
    "to_megatron",
    "to_plain",
]
