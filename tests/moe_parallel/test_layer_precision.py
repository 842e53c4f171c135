"""The layer in low precision and by kernels within a budget, and the same from run to run."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from moe_parallel import ExpertTopology, MoEConfig
from moe_parallel.router.counts import HostTokenCounts
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import ORDERS, groups_of, random_batch
from tests.moe_parallel.layers import NUM_TOKENS, LayerResult, build, on_ranks, oracle
from tests.moe_parallel.test_layer import GROUPED, LOW_PRECISION, TOPOLOGIES
from tests.ranks import run_on_ranks

FINE = MoEConfig(64, 32, 64, 8)  # many small experts: ordered and multiplied at once


def check_budget(
    topology: ExpertTopology,
    config: MoEConfig,
    dtype: torch.dtype,
    backend: str,
    copied: bool = False,
) -> None:
    order = ORDERS["zigzag"](64, topology.world_size)
    actual = on_ranks(topology, order, config, dtype, backend=backend, copied=copied)
    exact = oracle(config, dtype, num_tokens=64)
    honest = oracle(config, dtype, compute=dtype, num_tokens=64)
    # One number may be exact by luck. Its sum over tokens and experts may round once a level.
    levels = math.log2(64) + math.log2(config.num_experts)
    for name, got, wanted, eager in zip(LayerResult._fields, actual, exact, honest):
        terms = wanted * levels if got.dim() == 0 else None
        assert_within_budget(got, wanted, eager, terms=terms, what=name)


@pytest.mark.parametrize("config", [LOW_PRECISION, GROUPED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", [TOPOLOGIES[0], TOPOLOGIES[8]])
def test_low_precision_is_within_budget(
    topology: ExpertTopology, dtype: torch.dtype, config: MoEConfig
) -> None:
    check_budget(topology, config, dtype, "gloo")


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("topology", [ExpertTopology(2, ep=2), ExpertTopology(4, ep=2, etp=2)])
def test_kernels_are_within_budget(topology: ExpertTopology, copied: bool) -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    order = ORDERS["ragged"](64, topology.world_size)
    config = MoEConfig(32, 64, 8, 2, impl="triton", overlap_groups=2, aux_loss_coefficient=0.3)
    actual = on_ranks(topology, order, config, torch.float32, copied=copied)
    config = replace(config, impl="eager")
    exact = oracle(config, torch.float32, num_tokens=64)
    honest = oracle(config, torch.float32, compute=torch.float32, num_tokens=64)
    for name, got, wanted, eager in zip(LayerResult._fields, actual, exact, honest):
        assert_within_budget(got, wanted, eager, what=name)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", TOPOLOGIES[1:4])
def test_low_precision_on_two_gpus(topology: ExpertTopology, dtype: torch.dtype) -> None:
    check_budget(topology, LOW_PRECISION, dtype, "nccl")


@pytest.mark.gpu
def test_fine_experts_on_a_gpu() -> None:
    check_budget(TOPOLOGIES[0], FINE, torch.bfloat16, "nccl")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("overlap_groups", [1, 2])
def test_fine_experts_on_two_gpus(overlap_groups: int, copied: bool) -> None:
    config = replace(FINE, overlap_groups=overlap_groups)
    check_budget(ExpertTopology(2, ep=2), config, torch.bfloat16, "nccl", copied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bit_identical(dtype: torch.dtype) -> None:
    check_bits(ExpertTopology(4, ep=2, etp=2), dtype, "gloo")


@pytest.mark.multi_gpu
def test_runs_on_two_gpus_are_bit_identical() -> None:
    for topology in TOPOLOGIES[1:4]:
        check_bits(topology, torch.bfloat16, "nccl")


def check_bits(topology: ExpertTopology, dtype: torch.dtype, backend: str) -> None:
    order = ORDERS["shuffled"](200, topology.world_size)
    config = MoEConfig(32, 64, 8, 2, capacity_factor=1.0, drop_policy="probability")
    first, *others = (on_ranks(topology, order, config, dtype, backend=backend) for _ in range(3))
    for other in others:
        for name, a, b in zip(LayerResult._fields, first, other):
            assert torch.equal(a, b), name


def test_grouped_products_on_one_rank_ask_for_no_counts_on_the_host() -> None:
    x = random_batch(NUM_TOKENS, 32).x.float()
    layers = [
        build(replace(GROUPED, gemm=gemm), torch.float32, False) for gemm in ("grouped", "loop")
    ]
    grads = []
    for layer in layers:
        asked = patch.object(
            HostTokenCounts, "wait", autospec=True, side_effect=HostTokenCounts.wait
        )
        with asked as waits:
            layer(x).output.square().sum().backward()
        assert bool(waits.call_count) == (layer.config.gemm == "loop")
        grads.append([weight.grad for weight in layer.parameters()])
    for grouped, loop in zip(*grads):
        assert_equal_to_rounding(grouped, loop, tolerance=64 * torch.finfo(torch.float32).eps)
    few = build(replace(GROUPED, max_rows=3), torch.float32, False)
    with pytest.raises(ValueError, match="max_rows must be at least"):
        few(x)


def message_of_other_tokens() -> str:
    groups = groups_of(ExpertTopology(2)).experts
    layer = build(GROUPED, torch.float32, False, groups=groups)
    try:
        layer(torch.ones(3 + layer.mesh.token_rank, 32))
    except ValueError as error:
        return str(error)
    return ""


def test_replicas_with_other_numbers_of_tokens_raise_after_grouped_products() -> None:
    for message in run_on_ranks(message_of_other_tokens, 2):
        assert "token_order must be equal on every rank" in message
