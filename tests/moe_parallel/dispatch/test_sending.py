"""Tokens that cross to a rank once: the numbers of the oracle, and fewer bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_parallel import (
    ExpertTopology,
    MoEConfig,
    RouterConfig,
    RoutingReplay,
    TokenOrder,
)
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import ORDERS, assemble_expert, groups_of, random_batch
from tests.moe_parallel.dispatch.test_padding import PADDED, by_rank, host_reads
from tests.moe_parallel.host_memory import memory_of
from tests.moe_parallel.layers import (
    NUM_TOKENS,
    LayerResult,
    build,
    layer_on_rank,
    on_ranks,
    oracle,
)
from tests.ranks import run_on_ranks

TOKENS = MoEConfig(10, 12, 16, 4, aux_loss_coefficient=0.3, send="tokens")
EP2, EP4, TWO_BLOCKS = ExpertTopology(2, ep=2), ExpertTopology(4, ep=4), ExpertTopology(4, ep=2)
CAPPED: list[dict[str, Any]] = [
    {},
    {"capacity_factor": 0.75},
    {"capacity_factor": 0.75, "drop_policy": "probability"},
]


def check(topology: ExpertTopology, order_name: str, config: MoEConfig, **how: Any) -> None:
    order = ORDERS[order_name](NUM_TOKENS, topology.world_size)
    skew = how.pop("skew", False)
    actual = on_ranks(topology, order, config, torch.float64, skew, **how)
    for name, got, expected in zip(LayerResult._fields, actual, oracle(config, skew=skew)):
        assert_equal_to_rounding(got, expected, what=name)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("topology", [EP2, EP4, TWO_BLOCKS], ids=["ep 2", "ep 4", "2 x ep 2"])
def test_output_loss_and_gradients_are_the_oracles(topology: ExpertTopology, copied: bool) -> None:
    for order_name, skew in (("ragged", False), ("shuffled", True)):
        check(topology, order_name, TOKENS, copied=copied, skew=skew)


@pytest.mark.parametrize("capped", CAPPED[1:], ids=["position", "probability"])
@pytest.mark.parametrize("topology", [EP2, TWO_BLOCKS], ids=["ep 2", "2 x ep 2"])
def test_capacity_is_the_oracles(topology: ExpertTopology, capped: dict[str, Any]) -> None:
    config = replace(TOKENS, **capped)
    check(topology, "zigzag", config)
    check(topology, "ragged", config, skew=True)


@pytest.mark.slow
@pytest.mark.parametrize("capped", CAPPED, ids=str)
@pytest.mark.parametrize("ep", [2, 4, 8])
def test_eight_ranks(ep: int, capped: dict[str, Any]) -> None:
    for order_name in ORDERS:
        check(ExpertTopology(8, ep=ep), order_name, replace(TOKENS, **capped))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("capped", CAPPED, ids=str)
def test_two_gpus_are_the_oracles(capped: dict[str, Any], copied: bool) -> None:
    check(EP2, "ragged", replace(TOKENS, **capped), backend="nccl", copied=copied)


FINE = MoEConfig(64, 32, 64, 8, send="tokens")


def check_budget(config: MoEConfig, dtype: torch.dtype, **how: Any) -> None:
    order = ORDERS["zigzag"](64, 2)
    actual = on_ranks(EP2, order, config, dtype, **how)
    again = on_ranks(EP2, order, config, dtype, **how)
    eager = replace(config, impl="eager", gemm="auto")
    exact = oracle(eager, dtype, num_tokens=64)
    honest = oracle(eager, dtype, compute=dtype, num_tokens=64)
    for name, got, same, wanted, near in zip(LayerResult._fields, actual, again, exact, honest):
        assert torch.equal(got, same), f"{name} differs from run to run"
        assert_within_budget(got, wanted, near, what=name)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_budget_and_the_same_again(dtype: torch.dtype, impl: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    check_budget(replace(FINE, impl=impl, aux_loss_coefficient=0.3), dtype)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("gemm", ["loop", "grouped"])
def test_low_precision_on_two_gpus(gemm: str, copied: bool) -> None:
    check_budget(replace(FINE, gemm=gemm), torch.bfloat16, backend="nccl", copied=copied)


# ---- calls -------------------------------------------------------------------------------------


def padded_on_rank(config: MoEConfig, order: TokenOrder, copied: bool) -> LayerResult:
    return layer_on_rank(EP2, order, config, copied=copied)


@pytest.mark.parametrize("copied", [False, True])
def test_padded_calls_drop_by_rank_and_read_nothing_on_the_host(copied: bool) -> None:
    order, config = ORDERS["ragged"](NUM_TOKENS, 2), replace(PADDED, send="tokens")
    parts = run_on_ranks(padded_on_rank, 2, config, order, copied)
    actual = [torch.cat([part.output for part in parts])]
    for name in ("w13", "w2"):
        actual.append(assemble_expert([getattr(part, name) for part in parts], name, EP2))
    for tensor, expected in zip(actual, by_rank(order), strict=True):
        assert_equal_to_rounding(tensor, expected)
    assert run_on_ranks(host_reads, 2, EP2, config) == [0, 0]


VARIANTS: dict[str, dict[str, Any]] = {
    "shared": {"shared_ffn_size": 8, "shared_gate": True},
    "sigmoid": {"router": RouterConfig("sigmoid", scaling=2.5, expert_bias=True)},
    "padded": {"capacity_factor": 2.0, "pad_to_capacity": True},
    "bounded": {"max_rows": 400},
}


def as_assignments(name: str) -> None:
    """Rank function: outputs and gradients are those of the layer that sends assignments."""
    config, groups = replace(TOKENS, **VARIANTS[name]), groups_of(EP2).experts
    layer = build(config, torch.float64, False, groups=groups)
    other = build(replace(config, send="assignments"), torch.float64, False, groups=groups)
    x = random_batch(20, 10, seed=layer.mesh.token_rank).x.requires_grad_()
    order, replay = TokenOrder.contiguous([20, 20]), RoutingReplay()
    for given in ({}, {"replay": replay}, {"replay": replay}):  # chosen, kept, made again
        found = []
        for each in (layer, other):
            output = each(x, token_order=order, **given).output
            leaves = [x, *each.parameters()]
            found.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for actual, expected in zip(*found):
            assert_equal_to_rounding(actual, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_computed_does_not_depend_on_what_is_sent(name: str) -> None:
    run_on_ranks(as_assignments, 2, name)


def repeated(copied: bool, compared: bool) -> None:
    """Rank function: a recomputed layer, and a second backward, give the same bits."""
    groups = groups_of(EP2).experts
    memory = memory_of(groups) if copied else None
    layer = build(TOKENS, torch.float32, False, groups=groups, symmetric_memory=memory)
    x = random_batch(20, 10, seed=layer.mesh.token_rank).x.float().requires_grad_()
    leaves = [x, *layer.parameters()]
    order = TokenOrder.contiguous([20, 20]) if compared else None

    def call(x: Tensor) -> Tensor:
        return layer(x, token_order=order).output

    with torch.autograd.detect_anomaly():  # no part of a row is read as a number that it is not
        output = call(x)
        first = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(output.square().sum(), leaves)
    recomputed = checkpoint(call, x, use_reentrant=False)
    assert torch.equal(recomputed, output)
    third = torch.autograd.grad(recomputed.square().sum(), leaves)
    for a, b, c in zip(first, again, third):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    with torch.no_grad():
        assert torch.equal(call(x), output)


@pytest.mark.parametrize(("copied", "compared"), [(False, False), (True, False), (False, True)])
def test_backwards_may_be_repeated_and_forwards_recomputed(copied: bool, compared: bool) -> None:
    run_on_ranks(repeated, 2, copied, compared)


def refused(config: MoEConfig, more: int) -> str:
    layer = build(config, torch.float64, False, groups=groups_of(EP2).experts)
    try:
        layer(random_batch(8 + more * layer.mesh.token_rank, 10).x)
    except ValueError as error:
        return str(error)
    finally:
        dist.barrier()  # no rank is left waiting
    return ""


def test_ranks_that_differ_and_too_many_rows_raise_on_every_rank() -> None:
    for said in run_on_ranks(refused, 2, TOKENS, 1):
        assert "token_order must be equal on every rank" in said
    for said in run_on_ranks(refused, 2, replace(TOKENS, max_rows=3), 0):
        assert "max_rows must be at least" in said
