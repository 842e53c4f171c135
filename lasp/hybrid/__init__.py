"""The hybrid decoder, assembled from lightning attention, ring attention and expert parallelism.

``python -m lasp.hybrid`` prints the parameters of the named configurations.
"""

from lasp._core.failure import missing_ranks
from lasp._core.rotary import RopeScaling
from lasp.generation import GenerationCache, Sampling
from lasp.hybrid.activations import keep_activations
from lasp.hybrid.attention import AttentionConfig, LatentConfig
from lasp.hybrid.config import DenseConfig, HybridConfig, Residuals, ResidualScale, VocabularyConfig
from lasp.hybrid.generate import Generation
from lasp.hybrid.graphs import StepGraph
from lasp.hybrid.head import linear_cross_entropy
from lasp.hybrid.model import HybridModel, HybridOutput, ParameterCount, count_parameters
from lasp.hybrid.multi_token import next_in_document
from lasp.hybrid.packing import PackedBatch, pack_batch
from lasp.hybrid.parallel import parallelize
from lasp.hybrid.presets import (
    LING_2_5_1T,
    MINICPM_SALA,
    MINIMAX_TEXT_01,
    NAMED_CONFIGS,
    RING_FLASH_LINEAR_2_0,
    RING_MINI_LINEAR_2_0,
)
from lasp.hybrid.training import next_token_loss, reduce_gradients

__all__ = [
    "LING_2_5_1T",
    "MINICPM_SALA",
    "MINIMAX_TEXT_01",
    "NAMED_CONFIGS",
    "RING_FLASH_LINEAR_2_0",
    "RING_MINI_LINEAR_2_0",
    "AttentionConfig",
    "DenseConfig",
    "Generation",
    "GenerationCache",
    "HybridConfig",
    "HybridModel",
    "HybridOutput",
    "LatentConfig",
    "PackedBatch",
    "ParameterCount",
    "ResidualScale",
    "Residuals",
    "RopeScaling",
    "Sampling",
    "StepGraph",
    "VocabularyConfig",
    "count_parameters",
    "keep_activations",
    "linear_cross_entropy",
    "missing_ranks",
    "next_in_document",
    "next_token_loss",
    "pack_batch",
    "parallelize",
    "reduce_gradients",
]
