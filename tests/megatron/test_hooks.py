"""Hooks of wrappers see every parameter: with gathers and reductions overlapped, training is equal.

Megatron's distributed optimizer with ``overlap_param_gather`` waits for a parameter in a hook
before the forward of the module that owns it, and with ``overlap_grad_reduce`` reduces a bucket
once each of its parameters has a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from tests.closeness import assert_equal_to_rounding
from tests.hooks import calls_of_owners
from tests.megatron import test_gpt
from tests.megatron.cpu import gathered, initialize, summed, train_on_cpu
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

HYBRID = ("hybrid", "moe")
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}


def batches(groups: Any, number: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, positions and labels of this replica, so many micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    shape = (number, 2, test_gpt.ROWS, test_gpt.SEQUENCE)
    drawn = torch.randint(test_gpt.VOCAB, shape, generator=generator)
    drawn = drawn.chunk(groups.dp.size(), dim=2)[groups.dp.rank()]
    positions = torch.arange(test_gpt.SEQUENCE)
    return [(tokens, positions.expand_as(tokens), labels) for tokens, labels in drawn]


def run_schedule(model: DistributedDataParallel, parts: list[Any]) -> Tensor:
    """Forward and backward of these micro-batches; the sum of this rank's losses."""
    losses = get_forward_backward_func()(
        forward_step_func=test_gpt.forward_step,
        data_iterator=iter(parts),
        model=[model],
        num_microbatches=len(parts),
        seq_length=test_gpt.SEQUENCE,
        micro_batch_size=len(parts[0][0]),
        forward_only=False,
    )
    return torch.stack(losses).sum()


# ---- every owner of parameters is called -------------------------------------------------------


def calls_in_gpt(parts: tuple[str, ...], options: dict[str, Any]) -> dict[str, int]:
    groups = initialize()
    with train_on_cpu():
        model = test_gpt.build({}, parts, groups, **options)
        with calls_of_owners(model.module) as calls:
            run_schedule(model, batches(groups, 1, seed=8))
    return calls


@pytest.mark.parametrize("options", [{}, FULL, SELECTIVE], ids=["plain", "full", "selective"])
@pytest.mark.parametrize("parts", [("lightning", "moe"), ("ring", "moe"), HYBRID], ids="-".join)
def test_owners_in_gpt_model_are_called(parts: tuple[str, ...], options: dict[str, Any]) -> None:
    """As often as their part is computed: twice where it is recomputed."""
    (calls,) = run_on_ranks(calls_in_gpt, 1, parts, options)
    recomputed = {FULL["recompute_granularity"]: "decoder.layers.", "selective": ".mlp."}
    where = recomputed.get(options.get("recompute_granularity", ""), "nowhere")
    for name, number in calls.items():
        assert number == (2 if where in name else 1), f"{name}: {number} calls"


def calls_in_hybrid_model() -> dict[str, int]:
    from tests.megatron import test_stack

    groups = initialize()
    test_stack.moe_logging.destroy_moe_metrics_tracker()  # it is for models of one depth
    _, model = test_stack.build("GE*E" * 2, {}, groups)
    tokens = torch.arange(16).view(1, 16)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    with calls_of_owners(model) as calls:
        model(tokens, tokens, None, labels=tokens).sum().backward()
    return calls


def test_owners_in_hybrid_model_are_called() -> None:
    pytest.importorskip("megatron.core.models.hybrid.hybrid_model")
    (calls,) = run_on_ranks(calls_in_hybrid_model, 1)
    assert set(calls.values()) == {1}, calls


# ---- with overlap, the same numbers ------------------------------------------------------------

# As many experts as assignments: some have no token, in every micro-batch.
IDLE_EXPERTS = {"num_moe_experts": 64, "moe_ffn_hidden_size": 2}


class Trained(NamedTuple):
    """Losses of the steps and one after them, parameters of both replicas, buckets and idle."""

    losses: list[float]
    parameters: dict[str, list[Tensor]]
    num_buckets: int
    idle_experts: int


def trained(overlap: bool, options: dict[str, Any]) -> Trained:
    """Three steps of two micro-batches by the distributed optimizer; then one forward."""
    groups, idle = initialize(), []
    wrapper = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=500,
    )
    with train_on_cpu():
        model = test_gpt.build({}, HYBRID, groups, wrapper, **IDLE_EXPERTS, **options)
        for layer in model.module.decoder.layers:
            layer.mlp.moe.gate.register_forward_hook(
                lambda *call: idle.append(int((call[2].counts.assigned.sum(0) == 0).sum()))
            )
        config = OptimizerConfig(
            optimizer="adam",
            lr=0.02,
            params_dtype=torch.float64,
            use_distributed_optimizer=True,
            overlap_param_gather=overlap,
        )
        optimizer = get_megatron_optimizer(config, [model])
        model.config.grad_scale_func = optimizer.scale_loss
        model.config.no_sync_func = model.no_sync
        losses = []
        for step in range(3):
            model.zero_grad_buffer()
            optimizer.zero_grad()
            loss = run_schedule(model, batches(groups, 2, seed=step))
            optimizer.step()
            losses.append(summed(loss, groups.dp_cp).item())
        tokens, positions, labels = batches(groups, 1, seed=9)[0]
        with torch.no_grad():  # gathers end in hooks before its modules
            loss = model(tokens, positions, None, labels=labels).sum()
        losses.append(summed(loss, groups.dp_cp).item())
    parameters = {
        name: gathered(parameter.detach(), groups.dp)
        for name, parameter in model.module.named_parameters()
    }
    groups_of_buckets = model.bucket_groups + model.expert_parallel_bucket_groups
    buckets = sum(len(group.buckets) for group in groups_of_buckets)
    return Trained(losses, parameters, buckets, min(idle))


@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "recomputed"])
def test_overlapped_gathers_and_reductions_change_nothing(options: dict[str, Any]) -> None:
    (expected, _), (actual, _) = (
        run_on_ranks(trained, 2, overlap, options) for overlap in (False, True)
    )
    assert actual.num_buckets > expected.num_buckets
    assert actual.idle_experts > 0
    # Buckets of other sizes add the squares of the gradient norm in another order.
    assert actual.losses == pytest.approx(expected.losses, rel=1e-12)
    for name, (first, second) in actual.parameters.items():
        assert torch.equal(first, second), f"{name} differs between replicas"
        assert_equal_to_rounding(first, expected.parameters[name][0], what=name)
