"""Training steps by a graph are those of the model; without a GPU the same memory without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lasp.hybrid import HybridModel, StepGraph, keep_activations, pack_batch, reduce_gradients
from moe_parallel import ExpertTopology, MoEConfig, RouterConfig
from moe_parallel.experts import gemm
from tests.ranks import run_on_ranks
from tests.test_hybrid import MEDIUM, groups_of
from tests.test_training import CONFIG

LENGTHS = (13, 40, 11)
BATCH = pack_batch([LENGTHS], dp_rank=0, num_ranks=1, order="contiguous")


def loss_of(model: HybridModel) -> Callable[..., Tensor]:
    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        output = model(tokens, BATCH, labels=labels)
        assert output.loss is not None
        return output.loss / BATCH.layout.num_tokens + output.aux_loss

    return loss


def drawn(device: str, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pack = torch.randint(CONFIG.vocab_size, (2, sum(LENGTHS)), generator=generator)
    return [x.to(device) for x in pack]


def compare(model: HybridModel, device: str, exact: float) -> None:
    """Losses, gradients and loads of experts of steps by the graph, beside launched ones."""
    graph = StepGraph(model, loss_of(model), *drawn(device, 0))
    routers = [x for x in model.modules() if getattr(x, "expert_bias", None) is not None]
    for seed in (1, 2, 1):
        model.zero_grad()
        before = [x.local_tokens_per_expert.clone() for x in routers]
        found = graph.step(*drawn(device, seed)).clone()
        grads = {n: x.grad.clone() for n, x in model.named_parameters() if x.grad is not None}
        loads = [x.local_tokens_per_expert - b for x, b in zip(routers, before)]
        model.zero_grad()
        expected = loss_of(model)(*drawn(device, seed))
        expected.backward()
        assert (found - expected).abs() <= exact * expected.abs()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            error = (grads[name] - parameter.grad).abs().max()
            assert error <= exact * parameter.grad.abs().max(), name
        for router, load, b in zip(routers, loads, before):
            assert torch.equal(router.local_tokens_per_expert, b + 2 * load)
            assert load.sum() == 2 * sum(LENGTHS)


BIASED = replace(CONFIG, moe=MoEConfig(16, 8, 4, 2, router=RouterConfig(expert_bias=True)))


def test_static_memory_gives_the_steps_of_the_model() -> None:
    model = HybridModel(BIASED, dtype=torch.float64)
    model.reset_parameters(0)
    compare(model, "cpu", 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "softmax_outputs+expert_inputs", "full"])
@pytest.mark.parametrize("pattern", ["GG*", "***"])
def test_a_captured_step_is_a_launched_one(pattern: str, policy: str) -> None:
    router = RouterConfig(expert_bias=True)
    shape = replace(MEDIUM, pattern=pattern, moe=MoEConfig(96, 128, 4, 2, router=router))
    model = HybridModel(shape, device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    keep_activations(model, policy)
    compare(model, "cuda", 2e-2)  # kernels of softmax attention add up in any order


@pytest.mark.gpu
def test_experts_that_need_the_host_raise() -> None:
    shape = replace(MEDIUM, moe=MoEConfig(96, 128, 4, 2, gemm="loop"))
    model = HybridModel(shape, device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    with pytest.raises(RuntimeError, match="must not need counts of rows on the host"):
        StepGraph(model, loss_of(model), *drawn("cuda", 0))


@pytest.mark.gpu
def test_large_experts_are_captured_with_static_shapes() -> None:
    moe = MoEConfig(96, 128, 4, 2, static_shapes=True)
    model = HybridModel(replace(MEDIUM, moe=moe), device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    with mock.patch.multiple(gemm, LOOP_ROWS=1, LOOP_FLOPS=1, IN_PLACE=1):  # all are large
        compare(model, "cuda", 2e-2)


@pytest.mark.gpu
def test_what_a_graph_reads_outlives_the_caches() -> None:
    """Hundreds of other layouts come between its steps."""
    model = HybridModel(MEDIUM, device="cuda", dtype=torch.bfloat16)
    model.reset_parameters(0)
    graph = StepGraph(model, loss_of(model), *drawn("cuda", 0))
    first = graph.step(*drawn("cuda", 1)).clone()
    with torch.no_grad():
        for length in range(1, 400):
            batch = pack_batch([[length]], dp_rank=0, num_ranks=1, order="contiguous")
            model(torch.zeros(length, dtype=torch.int64, device="cuda"), batch)
    junk = [torch.full((1024,), -1, device="cuda") for _ in range(4096)]
    again = graph.step(*drawn("cuda", 1))
    assert len(junk) == 4096
    assert (again - first).abs() <= 1e-3 * first.abs()


def refused(change: Callable[[HybridModel], Any], message: str) -> None:
    model = HybridModel(CONFIG)
    model.reset_parameters(0)
    change(model)
    with pytest.raises(ValueError, match=message):
        StepGraph(model, loss_of(model), *drawn("cpu", 0))


def test_models_that_no_graph_trains_are_refused() -> None:
    refused(lambda model: keep_activations(model, "full+offload"), "keep activations on the device")

    def some_gradient(model: HybridModel) -> None:
        model.final_norm.weight.grad = torch.ones_like(model.final_norm.weight)

    refused(some_gradient, "must have no gradients but those of this graph")
    refused(lambda model: model.requires_grad_(False), "some of whose parameters require them")
    with torch.no_grad():
        refused(lambda model: None, "must be made with gradients enabled")
    run_on_ranks(refused_on_rank, 2)


def test_a_loss_is_a_scalar() -> None:
    model, inputs = HybridModel(CONFIG), drawn("cpu", 0)
    with pytest.raises(ValueError, match=r"loss_of must return a scalar, got \[1\]"):
        StepGraph(model, lambda *x: loss_of(model)(*x)[None], *inputs).step(*inputs)


def refused_on_rank() -> None:
    groups = groups_of(ExpertTopology(2, ep=2))
    model = HybridModel(CONFIG, groups=groups)
    with pytest.raises(ValueError, match="must be of a plain model on one rank"):
        StepGraph(model, loss_of(model), *drawn("cpu", 0))
    sharded = fully_shard(HybridModel(CONFIG))  # over a mesh without names
    with pytest.raises(ValueError, match="must be of a plain model on one rank"):
        StepGraph(sharded, loss_of(sharded), *drawn("cpu", 0))
    with pytest.raises(ValueError, match="which have summed its gradients in the backward"):
        reduce_gradients(sharded)
    model = HybridModel(CONFIG)
    model.reset_parameters(0)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(ValueError, match="must be of a plain model on one rank"):
        StepGraph(wrapped, loss_of(wrapped), *drawn("cpu", 0))
    with pytest.raises(ValueError, match="must be of a plain model on one rank"):
        StepGraph(model, loss_of(wrapped), *drawn("cpu", 0)).step(*drawn("cpu", 0))


def test_parameters_are_trained_as_when_the_graph_was_made() -> None:
    model = HybridModel(CONFIG)
    model.reset_parameters(0)
    model.embedding.requires_grad_(False)
    graph = StepGraph(model, loss_of(model), *drawn("cpu", 0))
    graph.step(*drawn("cpu", 0))
    for module in (model.embedding, model.final_norm):
        trained = module.weight.requires_grad
        module.requires_grad_(not trained)
        with pytest.raises(ValueError, match="frozen or unfrozen since: make the graph anew"):
            graph.step(*drawn("cpu", 0))
        module.requires_grad_(trained)
    graph.step(*drawn("cpu", 0))


def test_inputs_of_other_shapes_are_refused() -> None:
    model = HybridModel(CONFIG)
    model.reset_parameters(0)
    graph = StepGraph(model, loss_of(model), *drawn("cpu", 0))
    with pytest.raises(ValueError, match="make a graph for each layout"):
        graph.step(*(x[:-1] for x in drawn("cpu", 0)))
    graph.step(*drawn("cpu", 0))
    model.final_norm.weight.grad = torch.ones_like(model.final_norm.weight)
    with pytest.raises(ValueError, match="that a step would lose"):
        graph.step(*drawn("cpu", 0))
