"""Shared experts beside the others, and layers without experts, are the oracle's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import (
    DenseLayer,
    ExpertParallelMoE,
    ExpertTopology,
    MoEConfig,
    RouterConfig,
    TokenOrder,
)
from moe_parallel.experts.dense import DenseFFN
from moe_parallel.reference import reference_moe
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.moe_parallel.batch import ORDERS, assemble, groups_of, local_rows, random_batch
from tests.moe_parallel.host_memory import memory_of
from tests.ranks import run_on_ranks

NUM_TOKENS, HIDDEN = 21, 16
NAMES = ("output", "x", "gate", "w13", "w2", "shared.w13", "shared.w2", "shared.gate")


def config_of(gated: bool, **options: Any) -> MoEConfig:
    return MoEConfig(HIDDEN, 8, 4, 2, shared_ffn_size=24, shared_gate=gated, **options)


def parameters_of(layer: ExpertParallelMoE) -> list[Tensor]:
    assert layer.shared is not None
    return [layer.gate.weight, *layer.experts.parameters(), *layer.shared.parameters()]


def of_oracle(config: MoEConfig, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    layer, batch = ExpertParallelMoE(config, seed=3, dtype=dtype), random_batch(NUM_TOKENS, HIDDEN)
    weights = [w.detach().double().requires_grad_() for w in parameters_of(layer)]
    x = batch.x.to(dtype).double().requires_grad_()
    how = {"top_k": 2, "capacity_factor": config.capacity_factor, "router": config.router}
    result = reference_moe(x, *weights[:3], shared=weights[3:], **how)
    result.output.backward(batch.grad.to(dtype).double())
    return [result.output.detach(), x.grad, *(w.grad for w in weights)]


def of_layer(
    config: MoEConfig,
    order: TokenOrder,
    rank: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **kwargs: Any,
) -> list[Tensor]:
    layer = ExpertParallelMoE(config, seed=3, dtype=dtype, device=device, **kwargs)
    batch = random_batch(NUM_TOKENS, HIDDEN)
    x, grad = (
        local_rows(rows.to(dtype), order, rank, padding=torch.nan).to(device)
        for rows in (batch.x, batch.grad)
    )
    x.requires_grad_()
    for _ in range(2):  # the second call takes memory that the first gave back
        layer.zero_grad()
        x.grad = None
        result = layer(x, token_order=order)
        result.output.backward(grad)
    tensors = [result.output, x.grad, *(weight.grad for weight in parameters_of(layer))]
    return [tensor.detach().cpu() for tensor in tensors]


@pytest.mark.parametrize("gated", [False, True])
def test_one_rank(gated: bool) -> None:
    config = config_of(gated, capacity_factor=0.6, router=RouterConfig("sigmoid", scaling=2.0))
    actual = of_layer(config, TokenOrder.contiguous([NUM_TOKENS]))
    for name, got, wanted in zip(NAMES, actual, of_oracle(config)):
        assert_equal_to_rounding(got, wanted, what=name)


def on_rank(order: TokenOrder, gated: bool, device: str, copied: bool) -> list[Tensor]:
    groups = groups_of(ExpertTopology(dist.get_world_size(), ep=dist.get_world_size())).experts
    memory = memory_of(groups) if copied else None
    how = {"groups": groups, "symmetric_memory": memory, "device": device}
    return of_layer(config_of(gated), order, dist.get_rank(), **how)


def check_ranks(gated: bool, backend: str, copied: bool = False) -> None:
    order = ORDERS["zigzag"](NUM_TOKENS, 2)
    device = "cuda" if backend == "nccl" else "cpu"
    parts = run_on_ranks(on_rank, 2, order, gated, device, copied, backend=backend)
    actual = [assemble([part[i] for part in parts], order) for i in (0, 1)]
    actual += [sum(part[2] for part in parts)]
    actual += [torch.cat([part[i] for part in parts]) for i in (3, 4)]
    actual += [sum(part[i] for part in parts) for i in range(5, len(parts[0]))]
    for name, got, wanted in zip(NAMES, actual, of_oracle(config_of(gated)), strict=False):
        assert_equal_to_rounding(got, wanted, what=name)


def test_two_ranks() -> None:
    check_ranks(gated=True, backend="gloo")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_two_gpus(gated: bool, copied: bool) -> None:
    check_ranks(gated, "nccl", copied)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_aside_has_the_bits_of_the_current_stream(gated: bool) -> None:
    ffn = DenseFFN(512, 1024, gated, device="cuda", dtype=torch.bfloat16)
    ffn.reset_parameters(torch.Generator().manual_seed(0))
    x = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for aside in (False, True, True):
        ffn.zero_grad()
        x.grad = None
        y = ffn.start(x * 1, aside=aside)()
        (y.float() ** 2).sum().backward()
        results.append([y.detach().clone(), x.grad, *(w.grad.clone() for w in ffn.parameters())])
    for one, *others in zip(*results):
        assert all(torch.equal(one, other) for other in others)


def test_interpreted_kernels() -> None:
    pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    order, oracle = TokenOrder.contiguous([NUM_TOKENS]), of_oracle(config_of(True), torch.float32)
    honest = of_layer(config_of(True, impl="eager"), order, dtype=torch.float32)
    actual = of_layer(config_of(True, impl="triton"), order, dtype=torch.float32)
    for name, got, wanted, plain in zip(NAMES, actual, oracle, honest):
        assert_within_budget(got, wanted, plain, what=name)


def test_other_initial_values_do_not_change() -> None:
    with_shared, without = (
        ExpertParallelMoE(config, seed=7)
        for config in (config_of(True), MoEConfig(HIDDEN, 8, 4, 2))
    )
    names = dict(with_shared.named_parameters())
    for name, weight in without.named_parameters():
        assert torch.equal(names[name], weight)


def test_a_layer_without_experts_is_called_as_one_with_them() -> None:
    layer = DenseLayer(MoEConfig(HIDDEN, 8, 4, 2), 24, seed=2, dtype=torch.float64)
    order, batch = ORDERS["shuffled"](NUM_TOKENS, 1), random_batch(NUM_TOKENS, HIDDEN)
    x = local_rows(batch.x, order, 0, padding=torch.nan).requires_grad_()
    result = layer(x, token_order=order)
    result.output.backward(local_rows(batch.grad, order, 0, padding=torch.nan))
    weights = [w.detach().requires_grad_() for w in layer.ffn.parameters()]
    whole, none = batch.x.requires_grad_(), batch.x.new_zeros(2, HIDDEN)
    zeros = (none.new_zeros(2, 2, 1, HIDDEN), none.new_zeros(2, HIDDEN, 1))
    oracle = reference_moe(whole, none, *zeros, top_k=2, shared=weights)
    oracle.output.backward(batch.grad)
    assert_equal_to_rounding(assemble([result.output], order), oracle.output)
    assert_equal_to_rounding(assemble([x.grad], order), whole.grad)
    for weight, expected in zip(layer.ffn.parameters(), weights):
        assert_equal_to_rounding(weight.grad, expected.grad)
    assert result.aux_loss == 0
    assert result.stats.assigned.shape == (0,)
    batched = layer(x.detach().nan_to_num().view(1, *x.shape))
    assert_equal_to_rounding(batched.output[0], layer(x.detach().nan_to_num()).output)


def test_a_gate_without_a_shared_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="shared_gate must be False without a shared expert"):
        MoEConfig(HIDDEN, 8, 4, 2, shared_gate=True)
    with pytest.raises(ValueError, match="shared_ffn_size must be an integer >= 1"):
        MoEConfig(HIDDEN, 8, 4, 2, shared_ffn_size=0)
