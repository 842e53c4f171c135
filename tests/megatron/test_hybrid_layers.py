"""Which layer of a hybrid model is what: over stages, from one static spec, by its pattern."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from lasp.decay import decay_rates
from lasp.megatron_hybrid import (
    MINIMAX_TEXT_01,
    HybridConfig,
    hybrid_block_spec,
    is_softmax,
    minimax_layer_spec,
)
from moe_parallel.megatron import ExpertParallelMoELayer
from ring.megatron import RingSelfAttention
from tests.megatron.attention import HEADS, parallel_config
from tests.megatron.block import OPTIONS
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def layers_of_stages() -> list[tuple[int, bool, Tensor | None]]:
    """Number, kind and decay rates of the layers on this rank: 2 stages of 2 virtual ones."""
    groups = initialize(pp=2, vpp=2)
    options = {"virtual_pipeline_model_parallel_size": 2, "num_layers": 8}
    config = parallel_config({"pp": 2}, **(OPTIONS | options | {"linear_attention_freq": 3}))
    found = []
    for vp_stage in range(2):
        block = TransformerBlock(
            config,
            hybrid_block_spec(config, "2:1", vp_stage),
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        for layer in block.layers:
            softmax = isinstance(layer.self_attention, RingSelfAttention)
            rates = None if softmax else layer.self_attention.rates
            found.append((layer.layer_number - 1, softmax, rates))
    return found


def test_layers_of_virtual_stages_have_their_global_kind_and_rates() -> None:
    first, second = run_on_ranks(layers_of_stages, 2)
    assert [index for index, _, _ in first] == [0, 1, 4, 5]
    assert [index for index, _, _ in second] == [2, 3, 6, 7]
    for index, softmax, rates in first + second:
        assert softmax == (index in (2, 5))
        if not softmax:
            assert torch.equal(rates, decay_rates(HEADS, index, 8))


def static_spec_on_rank(**options: object) -> list[tuple[bool, float, type]]:
    """Of every layer whether it is softmax, its alpha and its MLP."""
    groups = initialize()
    options = OPTIONS | {"num_layers": 9, "kv_channels": 64} | options
    block = TransformerBlock(
        parallel_config({}, **options), minimax_layer_spec, pg_collection=groups
    )
    return [
        (
            isinstance(layer.self_attention, RingSelfAttention),
            layer.mlp_scale.alpha,
            type(layer.mlp),
        )
        for layer in block.layers
    ]


def test_one_static_spec_serves_every_layer() -> None:
    """What ``--spec lasp.megatron_hybrid minimax_layer_spec`` imports."""
    (layers,) = run_on_ranks(static_spec_on_rank, 1)
    softmax, alphas, mlps = zip(*layers, strict=True)
    assert softmax == (False,) * 7 + (True, False)
    assert set(alphas) == {(2 * 9) ** 0.25}
    assert set(mlps) == {ExpertParallelMoELayer}


def test_the_static_spec_of_a_dense_config_has_dense_mlps() -> None:
    dense = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
    (layers,) = run_on_ranks(static_spec_on_rank, 1, **dense)
    assert {mlp for _, _, mlp in layers} == {MLP}


def test_patterns_residuals_and_names_that_are_none() -> None:
    with pytest.raises(ValueError, match="residual must be"):
        HybridConfig(residual="middle")
    for name in ("impl", "exchange", "decay"):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'fast'"):
            HybridConfig(**{name: "fast"})
    for pattern in ("7", "0:0", "a:b", "-1:2"):
        with pytest.raises(ValueError, match="pattern must be"):
            is_softmax(pattern, 0)


def test_a_stack_needs_hybrid_model() -> None:
    """In another interpreter: this one may have it."""
    code = (
        "import sys, lasp.megatron_hybrid\n"
        "sys.modules['megatron.core.models.hybrid.hybrid_block'] = None\n"
        "import lasp.megatron_hybrid.stack"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: megatron-core must be >= 0.18 for HybridModel, got" in done.stderr


def test_minimax_has_the_residuals_of_deepnorm() -> None:
    assert abs(MINIMAX_TEXT_01.mlp.alpha - 3.5565588200778455) < 1e-12
    assert MINIMAX_TEXT_01.lightning == MINIMAX_TEXT_01.softmax == MINIMAX_TEXT_01.mlp
    assert MINIMAX_TEXT_01.residual == "post"
