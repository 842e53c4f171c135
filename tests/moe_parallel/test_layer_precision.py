"""The layer in low precision and by kernels within a budget, and the same from run to run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_parallel import ExpertTopology, MoEConfig
from tests.closeness import assert_within_budget
from tests.moe_parallel.batch import ORDERS
from tests.moe_parallel.layers import LayerResult, on_ranks, oracle
from tests.moe_parallel.test_layer import GROUPED, LOW_PRECISION, TOPOLOGIES


def check_budget(
    topology: ExpertTopology, config: MoEConfig, dtype: torch.dtype, backend: str
) -> None:
    order = ORDERS["zigzag"](64, topology.world_size)
    actual = on_ranks(topology, order, config, dtype, backend=backend)
    exact = oracle(config, dtype, num_tokens=64)
    honest = oracle(config, dtype, compute=dtype, num_tokens=64)
    for name, got, wanted, eager in zip(LayerResult._fields, actual, exact, honest):
        assert_within_budget(got, wanted, eager, what=name)


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
