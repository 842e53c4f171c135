"""Which layer of a hybrid model is what: over stages, from one static spec, by its pattern."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.hybrid import Residuals
from lasp.lightning.decay import decay_rates
from lasp.megatron import hybrid_block_spec, hybrid_layer_spec, hybrid_of, minimax_layer_spec
from moe_parallel.megatron import ExpertOptions, ExpertParallelMoELayer
from ring.megatron import RingSelfAttention
from tests.megatron.attention import HEADS, parallel_config
from tests.megatron.block import HYBRID, OPTIONS
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
            hybrid_block_spec(config, hybrid_of(config, HYBRID), vp_stage),
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
    """For every layer, whether it is softmax, its alpha and its MLP."""
    groups = initialize()
    shape = {"num_layers": 9, "kv_channels": 64, "linear_attention_freq": 8}
    options = OPTIONS | shape | options
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
    """What ``--spec lasp.megatron minimax_layer_spec`` imports."""
    (layers,) = run_on_ranks(static_spec_on_rank, 1)
    softmax, alphas, mlps = zip(*layers, strict=True)
    assert softmax == (False,) * 7 + (True, False)
    assert set(alphas) == {(2 * 9) ** 0.25}
    assert set(mlps) == {ExpertParallelMoELayer}


@pytest.mark.parametrize("frequency", [2, [1, 0] * 4 + [1]], ids=["number", "list"])
def test_the_static_spec_follows_linear_attention_freq(frequency: Any) -> None:
    (layers,) = run_on_ranks(static_spec_on_rank, 1, linear_attention_freq=frequency)
    assert [softmax for softmax, _, _ in layers] == [False, True] * 4 + [False]


def pattern_of_block(pattern: str, **options: Any) -> list[bool]:
    config, groups = parallel_config({}, **(OPTIONS | options)), initialize()
    hybrid = hybrid_of(config, replace(HYBRID, pattern=pattern))
    block = TransformerBlock(config, hybrid_block_spec(config, hybrid), pg_collection=groups)
    return [isinstance(layer.self_attention, RingSelfAttention) for layer in block.layers]


@pytest.mark.parametrize(
    ("pattern", "options", "softmax"),
    [
        ("7:1", {"linear_attention_freq": 3}, [False, False, True, False]),
        ("*GG*", {"linear_attention_freq": [0, 1, 1, 0]}, [True, False, False, True]),
        ("2:1", {"linear_attention_freq": [1, 1, 0, 1]}, [False, False, True, False]),
        (
            "1:3",
            {"linear_attention_freq": None, "hetereogenous_dist_checkpoint": True},
            [False, True, True, True],
        ),
    ],
)
def test_the_pattern_is_that_of_the_config(pattern: Any, options: Any, softmax: list[bool]) -> None:
    """Where pattern and config differ there are rows of tests/megatron/refusals.py."""
    assert run_on_ranks(pattern_of_block, 1, pattern, **options) == [softmax]


def test_the_static_spec_of_a_dense_config_has_dense_mlps() -> None:
    dense = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
    (layers,) = run_on_ranks(static_spec_on_rank, 1, **dense)
    assert {mlp for _, _, mlp in layers} == {MLP}


def test_a_stack_needs_hybrid_model() -> None:
    """In another interpreter: this one may have it."""
    code = (
        "import sys, lasp.megatron\n"
        "sys.modules['megatron.core.models.hybrid.hybrid_block'] = None\n"
        "import lasp.megatron.hybrid_stack"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: megatron-core must be >= 0.18 for HybridModel, got" in done.stderr


EXPERTS = ExpertOptions(
    gemm="loop", overlap_groups=2, max_rows=99, impl="eager", send="assignments"
)
CHOSEN = replace(
    HYBRID,
    lightning_impl="triton",
    exchange="sliced",
    decay="retnet",
    residuals=Residuals(init_gain=0.25),
    moe=replace(
        HYBRID.moe, gemm="loop", overlap_groups=2, max_rows=99, impl="eager", send="assignments"
    ),
)


def choices_of_parts(build_parts: Callable[[TransformerConfig], tuple[Any, Any]]) -> list[Any]:
    groups, options = initialize(), OPTIONS | {"linear_attention_freq": 2}
    config = parallel_config({}, **options)
    lightning, experts = (
        build_module(spec, config=config, pg_collection=groups, layer_number=2)
        for spec in build_parts(config)
    )
    moe, spread = experts.moe.config, experts.moe.experts.w13.std().item()
    return [
        (lightning.impl, lightning.exchange, lightning.rates),
        ExpertOptions.of(moe),
        spread,
    ]


def parts_of_layer(config: TransformerConfig) -> tuple[Any, Any]:
    parts = hybrid_layer_spec(hybrid_of(config, CHOSEN)).submodules
    return parts.lightning, parts.experts


def parts_of_stack(config: TransformerConfig) -> tuple[Any, Any]:
    from lasp.megatron.hybrid_stack import hybrid_stack_spec

    chosen = replace(CHOSEN, num_layers=2, pattern="GG")
    parts = hybrid_stack_spec("EGEG", chosen).submodules
    return parts.gdn_layer.submodules.self_attention, parts.moe_layer.submodules.mlp


@pytest.mark.parametrize("parts", [parts_of_layer, parts_of_stack])
def test_parts_get_what_is_chosen(parts: Callable[..., Any]) -> None:
    if parts is parts_of_stack:
        pytest.importorskip("megatron.core.models.hybrid.hybrid_block")
    ((attention, experts, spread),) = run_on_ranks(choices_of_parts, 1, parts)
    assert attention[:2] == ("triton", "sliced")
    assert torch.equal(attention[2], decay_rates(HEADS, 0, 2, "retnet"))
    assert experts == EXPERTS
    assert spread == pytest.approx(0.25 * 0.02, rel=0.2)  # of Megatron's init_method_std
