"""Checkpoints of our MoE layer, with the keys of Megatron's MoELayer with SequentialMLP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_object_for_checkpoint,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor

from moe_parallel.experts.dense import DenseFFN
from moe_parallel.layer import ExpertParallelMoE


def sharded_experts(
    moe: ExpertParallelMoE,
    groups: ProcessGroupCollection,
    prefix: str,
    offsets: tuple[Any, ...],
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """The sharded state of the gate and of this rank's part of the experts.

    ``moe`` has this name in its parent, whose prefix is given; ``offsets`` are along the axes of
    the layers, ``groups`` tp, ep, expt_tp and expt_dp.
    """
    metadata = ensure_metadata_has_dp_cp_group(metadata)
    if metadata.get("singleton_local_shards"):
        raise ValueError(
            "singleton_local_shards must be off for the expert-parallel MoE layer, got True: save"
            " without it"
        )
    gate: dict[str, Tensor] = {"weight": moe.gate.weight}
    if moe.gate.expert_bias is not None:
        gate["expert_bias"] = moe.gate.expert_bias
    sharded = make_sharded_tensors_for_checkpoint(
        gate,
        f"{prefix}router.",
        {},
        offsets,
        tp_group=groups.tp,
        dp_cp_group=metadata["dp_cp_group"],
    )
    result = {f"{prefix}moe.gate.{name}": sharded[f"{prefix}router.{name}"] for name in gate}
    if moe.shared is not None:
        result |= _sharded_shared(moe.shared, groups, prefix, offsets, metadata["dp_cp_group"])
    first = moe.mesh.ep_rank * moe.experts.w13.shape[0]
    for name, key in (("w13", "linear_fc1"), ("w2", "linear_fc2")):
        weight = getattr(moe.experts, name)
        places = [
            (len(offsets), first + index, moe.config.num_experts) for index in range(len(weight))
        ]
        result[f"{prefix}moe.experts.{name}"] = _factory(
            weight, f"{prefix}experts.experts.{key}.weight", offsets, places, groups
        )
        # Megatron's linear layers save an empty extra state each and ask for it when loading.
        for index, place in enumerate(places):
            result[f"{prefix}moe.experts.{name}.{index}._extra_state"] = (
                make_sharded_object_for_checkpoint(
                    None,
                    f"{prefix}experts.experts.{key}._extra_state",
                    (*offsets, place),
                    replica_id=(0, groups.expt_tp.rank(), groups.expt_dp.rank()),
                )
            )
    return result


def _sharded_shared(
    shared: DenseFFN,
    groups: ProcessGroupCollection,
    prefix: str,
    offsets: tuple[Any, ...],
    dp_cp_group: Any,
) -> dict[str, Any]:
    """The shared expert, which every rank holds whole, as Megatron's SharedExpertMLP."""
    keys = {"w13": "linear_fc1.weight", "w2": "linear_fc2.weight", "gate": "gate_weight"}
    start, replica, result = (
        f"{prefix}shared_experts.",
        (0, groups.tp.rank(), dp_cp_group.rank()),
        {},
    )

    def factory(key: str, weight: Tensor) -> ShardedTensorFactory:
        def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
            flat, axes = data.view(-1, data.shape[-1]), len(offsets)
            placed = {"replica_id": replica_id, "prepend_axis_num": axes}
            return [ShardedTensor.from_rank_offsets(key, flat, *offsets, **placed)]

        def merge(pieces: list[Tensor]) -> Tensor:
            return pieces[0].view(weight.shape)

        return ShardedTensorFactory(key, weight, build, merge, replica)

    for name, weight in shared.named_parameters():
        result[f"{prefix}moe.shared.{name}"] = factory(start + keys[name], weight)
    for linear in ("linear_fc1", "linear_fc2"):
        key = f"{start}{linear}._extra_state"
        made = make_sharded_object_for_checkpoint(None, key, offsets, replica_id=replica)
        result[f"{prefix}moe.shared.{linear}._extra_state"] = made
    return result


def _factory(
    weight: Tensor,
    key: str,
    offsets: tuple[Any, ...],
    places: list[tuple[int, int, int]],
    groups: ProcessGroupCollection,
) -> ShardedTensorFactory:
    """Pieces of ``w13`` or ``w2`` in the whole ``[E, 2 F, hidden]`` or ``[E, hidden, F]``.

    ``places`` are those of the local experts along the axis of all. Megatron has the gates of all
    ETP ranks before their ups, along the same dim.
    """
    etp, axes = groups.expt_tp, len(offsets)

    def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
        pieces = []
        for expert, place in zip(data, places):
            if expert.dim() == 3:  # w13: [2, F, hidden]
                cuts = [
                    (part, (axes + 1, half * etp.size() + etp.rank(), 2 * etp.size()))
                    for half, part in enumerate(expert)
                ]
            else:
                cuts = [(expert, (axes + 2, etp.rank(), etp.size()))]
            pieces += [
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *offsets,
                    place,
                    cut,
                    replica_id=replica_id,
                    prepend_axis_num=axes + 1,
                )
                for part, cut in cuts
            ]
        return pieces

    def merge(pieces: list[Tensor]) -> Tensor:
        return torch.stack(pieces).view(weight.shape)

    return ShardedTensorFactory(key, weight, build, merge, (0, 0, groups.expt_dp.rank()))
