"""torch's DDP and FSDP2 around models with split experts: gradients that are sums over ranks.

The loss of a rank is a share: the shares of all ranks sum to the loss of the batch. So gradients
must be summed. Those of dense parameters are summed over the token group. Those of experts, which
have seen the tokens of their whole EP x ETP block, are summed over the EDP group. By default the
wrappers average, each over its own group: gradients of dense parameters and of experts would be too
small by different factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lasp._core.checks import check_not_negative, check_part
from lasp._core.dtensors import local
from lasp._core.graphs import outside_graphs
from lasp._core.summed_gradients import any_summed, mark_summed
from moe_parallel.experts.experts import Experts
from moe_parallel.sharding import distribute_experts, split_experts
from moe_parallel.topology import ExpertTopology, ParallelGroups

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def apply_ddp(model: nn.Module, groups: ParallelGroups, **options: Any) -> DistributedDataParallel:
    """``DistributedDataParallel`` that sums gradients and leaves split experts to their replicas.

    Call ``backward`` on this rank's share of the loss. Gradients may be accumulated over several
    backwards, under ``no_sync()`` or not. Unfreeze, replace and convert parameters before this:
    nobody would sum their gradients, so the next forward raises ValueError.

    Args:
        model: holds any number of :class:`moe_parallel.ExpertParallelMoE`, each with
            ``groups.experts``; experts may be distributed (:func:`distribute_experts`).
        groups: this rank's groups, :meth:`moe_parallel.ExpertTopology.build_groups`.
        options: of ``DistributedDataParallel``, but its group.

    Returns:
        The wrapper to call; parameters stay those of ``model``.

    Communication: that of DDP over ``groups.token``; one all-reduce of each weight of split experts
    over ``groups.edp`` in every backward, which nothing hides.

    Raises:
        ValueError: for arguments of another type, if ``groups.token`` is None, ``options`` name a
            group, the model is wrapped already or nothing but split experts trains.
    """
    check_part("model", model, nn.Module)
    check_part("groups", groups, ParallelGroups)
    if groups.token is None:
        raise ValueError(
            "groups.token must be the ranks to sum over, got None: one rank needs none"
        )
    if {"process_group", "device_mesh"} & options.keys():
        raise ValueError("options must not name a group: it is groups.token")
    if any_summed(model):
        raise ValueError(
            "model must not be under apply_ddp or apply_fsdp already: gradients would be summed"
            " twice. Keep the wrapper, or build the model anew"
        )
    split = {p for _, experts in split_experts(model) for p in experts.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if split.issuperset(trained):
        raise ValueError(
            "model must have dense parameters that train, got"
            f" {'split experts alone' if trained else 'none'}: there is nothing for DDP to do. Sum"
            " the gradients of experts over groups.edp after the backward, of a HybridModel by"
            " reduce_gradients(model)"
        )
    for parameter in trained:
        # Hooks see a gradient before it is accumulated: what was accumulated is a sum already, and
        # stays one under the average that DDP takes of it again.
        if parameter not in split:
            parameter.register_hook(partial(_scaled, factor=groups.token.size()))
        elif groups.edp is not None:
            parameter.register_hook(partial(_summed, group=groups.edp))
        mark_summed(parameter)
    # DDP asks by either name: a wrapper may leave its own out of a parameter's, not of a module's.
    names = {name for name, parameter in model.named_parameters() if parameter in split}
    for path, experts in split_experts(model):
        names.update(f"{path}.{name}" for name, _ in experts.named_parameters())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(names))
    return _SummingDDP(model, process_group=groups.token, **options)


class _SummingDDP(DistributedDataParallel):
    """What :func:`apply_ddp` returns, and :func:`check_replicas` lets pass."""

    knows_experts = True

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._trained = {p: _kind(p) for p in model.parameters() if p.requires_grad}
        self._remember()

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """That of the module."""
        if torch.is_grad_enabled():
            self._check_trained()
        return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]

    def _remember(self) -> None:
        """Keep what :meth:`_state` tells of, and the objects, so that no other gets their id."""
        tables = (t for m in self.module.modules() for t in (m._modules, m._parameters))
        self._tables = [table for table in tables if isinstance(table, dict)]
        self._known = list(chain.from_iterable(map(dict.values, self._tables)))
        self._frozen = [p for p in self.module.parameters() if p not in self._trained]
        self._known_state = self._state()

    def _state(self) -> tuple[object, ...]:
        """Which modules and parameters there are, and which of these train in which dtype."""
        # No line of Python for each parameter: this takes 4 us for a decoder layer.
        objects = map(id, chain.from_iterable(map(dict.values, self._tables)))
        return (*objects, *map(_kind, self._trained), *map(_trains, self._frozen))

    @outside_graphs
    def _check_trained(self) -> None:
        """Raise ValueError if a parameter trains now that hooks do not know, or not so."""
        if self._state() == self._known_state:
            return
        names = [
            name
            for name, parameter in self.module.named_parameters()
            if parameter.requires_grad and self._trained.get(parameter) != _kind(parameter)
        ]
        if names:
            raise ValueError(
                "parameters must train as they did when apply_ddp was called, got"
                f" {names} unfrozen, new or converted since, whose gradients would not be summed:"
                " change the model before apply_ddp, or build it anew"
            )
        self._remember()

    def __deepcopy__(self, memo: object) -> DistributedDataParallel:
        """ValueError: hooks of parameters are not copied, and the copy would average."""
        raise ValueError(
            "the module of a wrapper must be copied, not the wrapper, which would average"
            " gradients: copy wrapper.module"
        )


_kind, _trains = attrgetter("dtype", "device"), attrgetter("requires_grad")


def _scaled(grad: Tensor, *, factor: int) -> Tensor:
    return grad * factor


@torch.no_grad()
def _summed(grad: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(local(grad), group=group)
    return grad


def apply_fsdp(
    model: nn.Module,
    topology: ExpertTopology,
    *,
    blocks: Iterable[nn.Module] = (),
    **options: Any,
) -> nn.Module:
    """``fully_shard`` experts over their replicas and all else over the token group, with sums.

    Call ``backward`` on this rank's share of the loss; make the optimizer after this. Split experts
    become DTensors over (edp, ep, etp), see :func:`distribute_experts`. Where ``mp_policy`` has a
    parameter dtype, the routers keep theirs, and so does any module with the attribute
    ``keeps_dtype``, as the float32 head of a hybrid model.

    Args:
        model: holds any number of :class:`moe_parallel.ExpertParallelMoE`; with its initial values,
            all on one device.
        topology: the sizes that the layers' groups were built with.
        blocks: modules that are gathered one after the other, the decoder layers as a rule. What
            they leave is gathered together.
        options: of ``fully_shard``, but its meshes and the placement.

    Returns:
        ``model``.

    Communication: makes process groups; every rank must call it. Then that of FSDP.

    Raises:
        ValueError: as :func:`distribute_experts`.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    check_part("blocks", blocks, Iterable)
    for block in (blocks := list(blocks)):
        check_part("block", block, nn.Module)
    mesh = distribute_experts(model, topology)
    ranks = torch.arange(topology.world_size).view(topology.pp, -1)
    tokens = DeviceMesh(mesh.device_type, ranks, mesh_dim_names=("pp", "token"))["token"]
    own_dtype = MixedPrecisionPolicy(cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, Experts):
            cut = partial(_cut, num_ranks=topology.edp)
            fully_shard(module, mesh=mesh["edp"], shard_placement_fn=cut, **options)
        elif getattr(module, "keeps_dtype", False) and "mp_policy" in options:
            fully_shard(module, mesh=tokens, **{**options, "mp_policy": own_dtype})
    for block in (*blocks, model):
        fully_shard(block, mesh=tokens, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _cut(weight: Tensor, *, num_ranks: int) -> Shard | None:
    """The hidden dim, which neither ep nor etp cuts; None, dim 0, if it does not divide."""
    from torch.distributed.tensor import Shard

    dim = 3 if weight.dim() == 4 else 1  # w13 [E, 2, F, hidden], w2 [E, hidden, F]
    return Shard(dim) if weight.shape[dim] % num_ranks == 0 else None


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, groups: ParallelGroups) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, by the norm over all ranks' parts.

    Args:
        model: with reduced gradients: plain, distributed or under either wrapper.
        max_norm: gradients are scaled down to it.
        groups: this rank's groups.

    Returns:
        The norm before, a scalar in float32 (float64); the same bits on every rank.

    Communication: one all-reduce of a number over ``groups.token``, and over ``groups.pp``.

    Raises:
        ValueError: for arguments of another type, and for a model without gradients.
    """
    check_part("model", model, nn.Module)
    check_part("groups", groups, ParallelGroups)
    if max_norm != math.inf:
        check_not_negative(max_norm=max_norm)
    split = {id(p): e.ep_size * e.etp_size for _, e in split_experts(model) for p in e.parameters()}
    num_ranks = 1 if groups.token is None else groups.token.size()
    grads, squares = [], []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        grad = local(parameter.grad)
        parts = _num_parts(parameter.grad) or split.get(id(parameter), 1)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        # Every rank counts a gradient as often as its own part has replicas: once in all.
        squares.append(torch.linalg.vector_norm(grad, dtype=dtype).square() * (parts / num_ranks))
        grads.append(grad)
    if not squares:
        raise ValueError("model must have gradients, got none: call backward before")
    total = torch.stack(squares).sum()
    for group in (groups.token, groups.pp):
        if group is not None:
            dist.all_reduce(total, group=group)
    norm = total.sqrt()
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _num_parts(grad: Tensor) -> int:
    """Into how many different parts a DTensor is cut; 0 for a plain tensor."""
    mesh = getattr(grad, "device_mesh", None)
    if mesh is None:
        return 0
    placements = getattr(grad, "placements", ())
    return math.prod(mesh.size(axis) for axis, at in enumerate(placements) if not at.is_replicate())
