"""Tools of torch that would mix the experts of ranks raise."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lasp.hybrid import HybridModel, pack_batch
from moe_parallel import ExpertTopology, apply_ddp, clip_grad_norm_, distribute_experts
from tests.ranks import run_on_ranks
from tests.test_hybrid import groups_of
from tests.test_training import CONFIG


def misused_on_rank() -> dict[str, str]:
    """What tools that do not know of experts answer, by how they were used."""
    topology = ExpertTopology(2, ep=2)
    groups, batch = groups_of(topology), pack_batch([[4], [4]], dp_rank=dist.get_rank(),
                                                    num_ranks=1, order="contiguous")  # fmt: skip

    def model(*, dtensors: bool) -> HybridModel:
        built = HybridModel(CONFIG, groups=groups)
        if dtensors:
            distribute_experts(built, topology)
        return built

    def ddp(built: nn.Module) -> None:
        DistributedDataParallel(built)(torch.arange(4), batch)

    def fsdp(built: nn.Module) -> None:
        fully_shard(built, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))

    def nested_ddp(built: HybridModel) -> None:
        """By hand: experts over their replicas, here one rank, and the rest over all."""
        alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        for layer in built.layers:
            layer.moe = DistributedDataParallel(layer.moe, process_group=alone)
        names = [name for name, _ in built.named_parameters() if ".experts." in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(built, names)
        ddp(built)

    uses = {
        "nested DDP": lambda: nested_ddp(model(dtensors=False)),
        "DDP": lambda: ddp(model(dtensors=False)),
        "DDP of DTensors": lambda: ddp(model(dtensors=True)),
        "fully_shard": lambda: fsdp(model(dtensors=False)),
        "fully_shard of DTensors": lambda: fsdp(model(dtensors=True)),
        "state_dict": lambda: model(dtensors=False).state_dict(),
        "load_state_dict": lambda: model(dtensors=False).load_state_dict(
            HybridModel(CONFIG).state_dict()
        ),
        "get_model_state_dict": lambda: get_model_state_dict(model(dtensors=False)),
        "another topology": lambda: distribute_experts(model(dtensors=False), ExpertTopology(2)),
        "a group": lambda: apply_ddp(model(dtensors=False), groups, process_group=groups.token),
        "no gradients": lambda: clip_grad_norm_(model(dtensors=False), 1.0, groups),
    }
    answers = {}
    for name, use in uses.items():
        try:
            use()
        except (ValueError, RuntimeError) as error:
            answers[name] = str(error)
    assert answers.keys() == uses.keys()
    return answers


def test_tools_that_would_mix_experts_raise() -> None:
    for answers in run_on_ranks(misused_on_rank, 2):
        for name, message in {
            "DDP": "DistributedDataParallel over ranks [0, 1] must not hold experts",
            "nested DDP": "must not hold experts that are split over ranks",
            "fully_shard": "w13 must not be sharded over",
            "state_dict": "call moe_parallel.distribute_experts(model, topology) first",
            "load_state_dict": "call moe_parallel.distribute_experts(model, topology) first",
            "get_model_state_dict": "call moe_parallel.distribute_experts(model, topology) first",
            "another topology": "topology must be that of the groups of layers.0.moe.experts",
            "a group": "options must not name a group",
            "no gradients": "model must have gradients",
        }.items():
            assert message in answers[name], name
