"""Tools of torch that would mix the experts of ranks raise; so do ours, called twice or late."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lasp.hybrid import HybridModel, pack_batch, reduce_gradients
from moe_parallel import (
    ExpertTopology,
    ParallelGroups,
    apply_ddp,
    apply_fsdp,
    clip_grad_norm_,
    distribute_experts,
)
from tests.ranks import run_on_ranks
from tests.test_adapted_models import scaled_experts
from tests.test_hybrid import groups_of
from tests.test_training import CONFIG

TOPOLOGY = ExpertTopology(2, ep=2)
Use = tuple[Callable[[], object], str]


def ddp(model: nn.Module) -> None:
    batch = pack_batch([[4], [4]], dp_rank=dist.get_rank(), num_ranks=1, order="contiguous")
    DistributedDataParallel(model)(torch.arange(4), batch)


def fsdp(model: nn.Module) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))


def nested_ddp(model: HybridModel) -> None:
    """By hand: experts over their replicas, here one rank, and the rest over all."""
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    for layer in model.layers:
        layer.moe = DistributedDataParallel(layer.moe, process_group=alone)
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    ddp(model)


def experts_alone(model: HybridModel) -> HybridModel:
    model.requires_grad_(False)
    for layer in model.layers:
        layer.moe.experts.requires_grad_(True)
    return model


def uses_of_torch(groups: ParallelGroups) -> list[Use]:
    """Tools that do not know of experts, and what they must say."""

    def model() -> HybridModel:
        return HybridModel(CONFIG, groups=groups)

    def of_dtensors() -> HybridModel:
        built = model()
        distribute_experts(built, TOPOLOGY)
        return built

    first = "call moe_parallel.distribute_experts(model, topology) first"
    return [
        (lambda: nested_ddp(model()), "must not hold experts that are split over ranks"),
        (
            lambda: ddp(model()),
            "DistributedDataParallel over ranks [0, 1] must not hold experts",
        ),
        (lambda: ddp(of_dtensors()), ""),
        (lambda: ddp(scaled_experts(model())), "must not hold experts that are split"),
        (lambda: fsdp(model()), "w13 must not be sharded over"),
        (lambda: fsdp(of_dtensors()), ""),
        (lambda: model().state_dict(), first),
        (lambda: model().load_state_dict(HybridModel(CONFIG).state_dict()), first),
        (lambda: get_model_state_dict(model()), first),
    ]


def uses_of_ours(groups: ParallelGroups) -> list[Use]:
    """What models that a tool of ours cannot take, or not twice, answer to it."""

    def model(device: str = "cpu") -> HybridModel:
        return HybridModel(CONFIG, groups=groups, device=device)

    under_ddp, under_fsdp = model(), model()
    wrapper = apply_ddp(under_ddp, groups)
    apply_fsdp(under_fsdp, TOPOLOGY)
    other = ExpertTopology(2)
    w2 = "layers.0.moe.experts.w2 must be a parameter"
    already = "model must not be under apply_ddp or apply_fsdp already"
    return [
        (
            lambda: distribute_experts(model(), other),
            "topology must be that of the groups of layers.0.moe.experts",
        ),
        (
            lambda: apply_ddp(model(), groups, process_group=groups.token),
            "options must not name a group",
        ),
        (lambda: clip_grad_norm_(model(), 1.0, groups), "model must have gradients"),
        (lambda: distribute_experts(scaled_experts(model()), TOPOLOGY), w2),
        (lambda: apply_fsdp(scaled_experts(model()), TOPOLOGY), w2),
        (lambda: apply_fsdp(model("meta"), TOPOLOGY), "got parameters on meta"),
        (
            lambda: apply_ddp(experts_alone(model()), groups),
            "model must have dense parameters that train",
        ),
        (lambda: apply_ddp(under_ddp, groups), already),
        (lambda: apply_ddp(under_fsdp, groups), already),
        (lambda: copy.deepcopy(wrapper), "the module of a wrapper must be copied"),
        (lambda: reduce_gradients(under_ddp), "leave reduce_gradients out"),
        (lambda: reduce_gradients(under_fsdp), "leave reduce_gradients out"),
    ]


def misused_on_rank() -> None:
    groups = groups_of(TOPOLOGY)
    for use, message in uses_of_torch(groups):
        with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
            use()
    for use, message in uses_of_ours(groups):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()


def test_misuse_raises_on_every_rank() -> None:
    run_on_ranks(misused_on_rank, 2)
