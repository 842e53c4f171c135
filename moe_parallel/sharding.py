"""Split experts as torch's own tools must see them: DTensors, which know what a rank holds.

A rank's experts are plain tensors by default, of the same names and shapes on every rank. To a tool
that does not know of expert parallelism they look like replicas of each other: DDP would broadcast
them, FSDP cut them across each other, and a checkpoint keep those of one rank.
:func:`distribute_experts` makes them DTensors over (ep, etp). Until then ``state_dict()`` raises,
and so do wrappers over ranks that hold other experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lasp._core.checks import check_part
from moe_parallel.experts.experts import Experts
from moe_parallel.topology import ExpertTopology

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def split_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """The named expert modules of a model that hold a part of their layer's experts."""
    for name, module in model.named_modules():
        if isinstance(module, Experts) and module.split_axes:
            yield name, module


def parameter_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Dense parameters and experts, each a parameter group of a torch optimizer.

    An optimizer updates the parameters of a group together, by default on GPUs, and refuses plain
    tensors beside DTensors: after :func:`distribute_experts` only the experts are DTensors. The
    groups are the same at every ep, etp and number of ranks, so optimizer states load at others.

    Args:
        model: holds any number of :class:`moe_parallel.ExpertParallelMoE`; distributed or not.

    Returns:
        ``[{"params": dense}, {"params": experts}]``; without experts the first alone. Add options
        of a group, such as ``weight_decay``, to the dicts.

    Raises:
        ValueError: for what is no module.
    """
    check_part("model", model, nn.Module)
    experts = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    dense = [p for p in model.parameters() if p not in experts]
    ordered = [p for p in model.parameters() if p in experts]
    return [{"params": params} for params in (dense, ordered) if params]


def distribute_experts(model: nn.Module, topology: ExpertTopology) -> DeviceMesh:
    """Make the split experts of a model DTensors over (ep, etp), in place.

    ``torch.distributed.checkpoint`` then saves and loads them, and their optimizer states, under
    any ep, etp and number of ranks, and ``state_dict()`` no longer raises. Make the optimizer after
    this, with :func:`parameter_groups`: the parameters are new objects, of the same memory. A call
    of the layer costs the host some tens of microseconds more.

    Args:
        model: holds any number of :class:`moe_parallel.ExpertParallelMoE`.
        topology: the sizes that the layers' groups were built with.

    Returns:
        The mesh of all ranks, with axes pp, edp, ep and etp.

    Communication: makes process groups; every rank must call it.

    Raises:
        ValueError: for arguments of another type, if a layer is split otherwise than ``topology``
            says, a weight is computed by a parametrization, or the model lies on meta.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    check_part("model", model, nn.Module)
    check_part("topology", topology, ExpertTopology)
    device_type = next(model.parameters()).device.type
    shape = (topology.pp, topology.edp, topology.ep, topology.etp)
    ranks = torch.arange(topology.world_size).view(shape)
    at = topology.expert_coordinates(dist.get_rank())
    if device_type == "meta":
        raise ValueError(
            "model must lie on the device that it is trained on, got parameters on meta: build it"
            " there, with to_empty() and its values before this"
        )
    parts = list(split_experts(model))
    for name, experts in parts:
        _check_split(name, experts, topology, (at.ep, at.etp))
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=("pp", "edp", "ep", "etp"))
    made: dict[nn.Parameter, nn.Parameter] = {}
    for _, experts in parts:
        axes = experts.split_axes
        for name, dims in experts.sharding().items():
            weight = getattr(experts, name)
            if isinstance(weight, DTensor):
                continue
            placements = [Shard(dims.ep_dim if axis == "ep" else dims.etp_dim) for axis in axes]
            if weight not in made:  # layers may share their experts
                whole = DTensor.from_local(weight.detach(), mesh[axes], placements, run_check=False)
                made[weight] = nn.Parameter(whole, weight.requires_grad)
            setattr(experts, name, made[weight])
    return mesh


def _check_split(
    name: str, experts: Experts, topology: ExpertTopology, at: tuple[int, int]
) -> None:
    for weight in experts.sharding():
        if not isinstance(getattr(experts, weight), nn.Parameter):
            raise ValueError(
                f"{name}.{weight} must be a parameter, got one that a parametrization computes:"
                " train it plain, with apply_ddp or reduce_gradients"
            )
    found = (experts.ep_size, experts.etp_size, experts.ep_rank, experts.etp_rank)
    if found != (topology.ep, topology.etp, *at):
        raise ValueError(
            f"topology must be that of the groups of {name}, ep {found[0]} and etp {found[1]} with"
            f" this rank at {found[2:]}, got ep {topology.ep} and etp {topology.etp} with this rank"
            f" at {at}: pass the topology whose build_groups() the model was built with"
        )


def check_replicas(experts: Experts) -> None:
    """Raise ValueError if ``DistributedDataParallel`` takes split experts for replicas.

    It broadcasts parameters when it is made, where no module is asked: so this looks at whose
    forward is going on, of nested ones at the innermost.
    """
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or getattr(wrapper, "knows_experts", False):
        return
    # Not experts.w13: a parametrization computes it from the parameters that the wrapper holds.
    if not set(experts.parameters()).isdisjoint(wrapper._module_parameters):
        ranks = dist.get_process_group_ranks(wrapper.process_group)
        raise ValueError(
            f"DistributedDataParallel over ranks {ranks} must not hold experts that are split over"
            " ranks: it overwrites them where its ranks hold other ones, and averages gradients of"
            " experts and of all else over different numbers of ranks. Wrap a new model with"
            " moe_parallel.apply_ddp"
        )
