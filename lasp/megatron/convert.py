"""Weights of the plain hybrid model as those of Megatron's GPTModel, and back.

    load_plain_weights(gpt_model, dict(plain.named_parameters()))   # each rank takes its part
    plain.load_state_dict(plain_weights([gpt_model]), strict=False) # whole, on every rank

Between them a checkpoint of Megatron's ``dist_checkpointing`` may change every parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from lasp.megatron.checks import groups_of
from moe_parallel.experts.experts import Experts

# One to one: names in lasp.hybrid.HybridModel and in GPTModel.
_OF_MODEL = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
}
_OF_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.norm.weight": "self_attention.out_norm.weight",
    "attention.out_proj.weight": "self_attention.out_proj.weight",
    "attention.o_proj.weight": "self_attention.linear_proj.weight",
    "moe_norm.weight": "pre_mlp_layernorm.weight",
    "mlp.w2": "mlp.linear_fc2.weight",
    "moe.gate.weight": "mlp.moe.gate.weight",
    "moe.gate.expert_bias": "mlp.moe.gate.expert_bias",
    "moe.shared.w13": "mlp.moe.shared.w13",
    "moe.shared.w2": "mlp.moe.shared.w2",
    "moe.shared.gate": "mlp.moe.shared.gate",
    "moe.experts.w13": "mlp.moe.experts.w13",
    "moe.experts.w2": "mlp.moe.experts.w2",
}
# One to one in layers of latent attention, whose norm of queries has the name of other layers'.
_OF_LATENT = {
    "attention.kv_a_proj_with_mqa.weight": "self_attention.linear_kv_down_proj.weight",
    "attention.kv_a_layernorm.weight": "self_attention.kv_layernorm.weight",
    "attention.kv_b_proj.weight": "self_attention.linear_kv_up_proj.weight",
    "attention.q_a_proj.weight": "self_attention.linear_q_down_proj.weight",
    "attention.q_a_layernorm.weight": "self_attention.q_layernorm.weight",
    "attention.q_b_proj.weight": "self_attention.linear_q_up_proj.weight",
    "attention.q_proj.weight": "self_attention.linear_q_proj.weight",
}
# Several to one, by head and by key head.
_LIGHTNING = ("attention.qkv_proj.weight", "attention.output_gate.weight")
_LIGHTNING_MERGED = "self_attention.in_proj.weight"
_SOFTMAX = tuple(f"attention.{name}_proj.weight" for name in "qkv")
_SOFTMAX_GATE = "attention.output_gate.weight"
_SOFTMAX_MERGED = "self_attention.linear_qkv.weight"
# Norms of queries and keys have one name in the plain model, and Megatron's own in softmax layers.
_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")
_LIGHTNING_NORMS = ("self_attention.q_norm.weight", "self_attention.k_norm.weight")
_SOFTMAX_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
_DENSE = "mlp.w13"
_DENSE_MERGED = "mlp.linear_fc1.weight"


def to_megatron(
    weights: Mapping[str, Tensor], *, num_heads: int, num_kv_heads: int
) -> dict[str, Tensor]:
    """Whole weights, or their gradients, under the names and in the layouts of GPTModel.

    Args:
        weights: by the names of :class:`lasp.hybrid.HybridModel`, all of them or some; those of the
            attention of a layer together.
        num_heads: of all attention layers.
        num_kv_heads: of the softmax layers.

    Returns:
        Tensors by the names of a GPTModel with all layers in one stage.

    Raises:
        ValueError: for a name that the plain model does not have.
    """
    left, named = dict(weights), {}
    for ours, theirs in _names(left, "layers."):
        if ours in left:
            named[theirs] = left.pop(ours)
    for index in _layers(left, "layers."):
        prefix, merged = f"layers.{index}.", f"decoder.layers.{index}."
        if prefix + next(iter(_OF_LATENT)) in left:
            for ours, theirs in _OF_LATENT.items():
                if prefix + ours in left:
                    named[merged + theirs] = left.pop(prefix + ours)
        norms = _SOFTMAX_NORMS if prefix + _SOFTMAX[0] in left else _LIGHTNING_NORMS
        for ours, theirs in zip(_NORMS, norms):
            if prefix + ours in left:
                named[merged + theirs] = left.pop(prefix + ours)
        if prefix + _LIGHTNING[0] in left:
            qkv, gate = (left.pop(prefix + name) for name in _LIGHTNING)
            named[merged + _LIGHTNING_MERGED] = merge_projections(qkv, gate, num_heads)
        if prefix + _SOFTMAX[0] in left:
            names = [*_SOFTMAX]
            if prefix + _SOFTMAX_GATE in left:
                names.insert(1, _SOFTMAX_GATE)
            parts = [left.pop(prefix + name).unflatten(0, (num_kv_heads, -1)) for name in names]
            named[merged + _SOFTMAX_MERGED] = torch.cat(parts, dim=1).flatten(0, 1)
        if prefix + _DENSE in left:
            named[merged + _DENSE_MERGED] = left.pop(prefix + _DENSE).flatten(0, 1)
    _check_nothing_left(left, "lasp.hybrid.HybridModel")
    return named


def to_plain(
    weights: Mapping[str, Tensor], *, num_heads: int, num_kv_heads: int, gated: bool = False
) -> dict[str, Tensor]:
    """Inverse of :func:`to_megatron`; ``gated`` is whether softmax layers have an output gate.

    Raises:
        ValueError: for a name that a GPTModel of hybrid layers does not have.
    """
    left, named = dict(weights), {}
    for ours, theirs in _names(left, "decoder.layers."):
        if theirs in left:
            named[ours] = left.pop(theirs)
    for index in _layers(left, "decoder.layers."):
        prefix, merged = f"layers.{index}.", f"decoder.layers.{index}."
        if merged + next(iter(_OF_LATENT.values())) in left:
            for ours, theirs in _OF_LATENT.items():
                if merged + theirs in left:
                    named[prefix + ours] = left.pop(merged + theirs)
        for ours, theirs in zip(_NORMS * 2, _LIGHTNING_NORMS + _SOFTMAX_NORMS):
            if merged + theirs in left:
                named[prefix + ours] = left.pop(merged + theirs)
        if merged + _LIGHTNING_MERGED in left:
            parts = split_projections(left.pop(merged + _LIGHTNING_MERGED), num_heads)
            named |= {prefix + name: part for name, part in zip(_LIGHTNING, parts)}
        if merged + _SOFTMAX_MERGED in left:
            by_group = left.pop(merged + _SOFTMAX_MERGED).unflatten(0, (num_kv_heads, -1))
            queries = num_heads // num_kv_heads
            names = {_SOFTMAX[0]: queries, **({_SOFTMAX_GATE: queries} if gated else {})}
            names |= dict.fromkeys(_SOFTMAX[1:], 1)
            size = by_group.shape[1] // sum(names.values())
            parts = by_group.split([heads * size for heads in names.values()], dim=1)
            named |= {prefix + name: part.flatten(0, 1) for name, part in zip(names, parts)}
        if merged + _DENSE_MERGED in left:
            named[prefix + _DENSE] = left.pop(merged + _DENSE_MERGED).unflatten(0, (2, -1))
    _check_nothing_left(left, "a GPTModel of hybrid layers")
    return named


@torch.no_grad()
def load_plain_weights(
    model: GPTModel,
    weights: Mapping[str, Tensor],
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> None:
    """Copy this rank's part of whole plain weights into its stage of a GPTModel.

    Args:
        model: GPTModel of :func:`hybrid_block_spec` with untied embeddings, not wrapped; with
            virtual stages call it for each.
        weights: by the names of :class:`lasp.hybrid.HybridModel`, at least those of this stage, on
            any device, of any dtype.
        pg_collection: its tp, ep and expt_tp groups; of the parallel state if None.

    Raises:
        ValueError: if a weight is missing or of another shape.
    """
    groups = _groups(pg_collection)
    whole = to_megatron(weights, **_heads(model))
    for name, parameter in _named_parameters(model):
        if name not in whole:
            raise ValueError(f"weights must have {name} of this stage, got {sorted(whole)[:3]}...")
        part = _by_halves(name, whole[name])
        for group, dim in _cuts(name, parameter, groups):
            part = part.chunk(group.size(), dim)[group.rank()]
        part = _joined(name, part)
        if part.shape != parameter.shape:
            raise ValueError(
                f"{name} must have shape {tuple(parameter.shape)} on this rank, got"
                f" {tuple(part.shape)} of {tuple(whole[name].shape)}: the models must be alike"
            )
        parameter.copy_(part)


@torch.no_grad()
def plain_weights(
    models: Sequence[GPTModel], *, pg_collection: ProcessGroupCollection | None = None
) -> dict[str, Tensor]:
    """Whole weights of a GPTModel on every rank, for a plain model that fits on one.

    Args:
        models: the virtual stages of this rank, not wrapped.
        pg_collection: its tp, ep, expt_tp and pp groups; of the parallel state if None.

    Returns:
        Tensors on the CPU by the names of :class:`lasp.hybrid.HybridModel`.

    Communication: an all-gather of every split parameter over its groups, then of all of them over
    the pipeline stages. Every rank must call it.
    """
    groups = _groups(pg_collection)
    of_stage = {}
    for model in models:
        for name, parameter in _named_parameters(model):
            whole = _by_halves(name, parameter.detach())
            for group, dim in reversed(_cuts(name, parameter, groups)):
                parts = [torch.empty_like(whole) for _ in range(group.size())]
                dist.all_gather(parts, whole.contiguous(), group=group)
                whole = torch.cat(parts, dim)
            of_stage[name] = _joined(name, whole).cpu()
    stages: list[Any] = [None] * groups["pp"].size()
    dist.all_gather_object(stages, of_stage, group=groups["pp"])
    weights = {name: weight for stage in stages for name, weight in stage.items()}
    gated = models[0].config.attention_output_gate
    return to_plain(weights, **_heads(models[0]), gated=gated)


def _heads(model: GPTModel) -> dict[str, int]:
    config = model.config
    return {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_query_groups}


def _groups(pg_collection: ProcessGroupCollection | None) -> dict[str, Any]:
    names = ("tp", "ep", "expt_tp", "pp")
    return dict(zip(names, groups_of(pg_collection, "conversion of weights", *names)))


def _cuts(name: str, parameter: Tensor, groups: dict[str, Any]) -> list[tuple[Any, int]]:
    """How a parameter is cut: process groups, outermost first, and the dim of each."""
    if ".experts." in name:
        dims = Experts.sharding()[name.rpartition(".")[2]]
        return [(groups["ep"], dims.ep_dim), (groups["expt_tp"], dims.etp_dim)]
    if name.endswith(_DENSE_MERGED):
        return [(groups["tp"], 1)]
    if getattr(parameter, "tensor_model_parallel", False):
        return [(groups["tp"], parameter.partition_dim)]  # type: ignore[attr-defined]
    return []


def _by_halves(name: str, weight: Tensor) -> Tensor:
    """Gate and up of a dense MLP side by side: a tensor-parallel rank has a part of each."""
    return weight.unflatten(0, (2, -1)) if name.endswith(_DENSE_MERGED) else weight


def _joined(name: str, weight: Tensor) -> Tensor:
    """Inverse of :func:`_by_halves`."""
    return weight.flatten(0, 1) if name.endswith(_DENSE_MERGED) else weight


def _named_parameters(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and biases of experts by their names in a model with all layers in one stage."""
    start = "decoder.layers."
    biases = (pair for pair in model.named_buffers() if pair[0].endswith("gate.expert_bias"))
    for name, parameter in chain(model.named_parameters(), biases):
        if name.startswith(start):
            index, _, rest = name.removeprefix(start).partition(".")
            number = model.decoder.layers[int(index)].layer_number
            name = f"{start}{number - 1}.{rest}"
        yield name, parameter


def _layers(weights: Mapping[str, Tensor], start: str) -> list[int]:
    rests = (name.removeprefix(start) for name in weights if name.startswith(start))
    return sorted({int(rest.partition(".")[0]) for rest in rests})


def _names(weights: Mapping[str, Tensor], start: str) -> Iterator[tuple[str, str]]:
    """Pairs of names that are one to one, the plain one first."""
    yield from _OF_MODEL.items()
    for index in _layers(weights, start):
        for ours, theirs in _OF_LAYER.items():
            yield f"layers.{index}.{ours}", f"decoder.layers.{index}.{theirs}"


def _check_nothing_left(left: Mapping[str, Tensor], model: str) -> None:
    if left:
        raise ValueError(f"weights must be those of {model}, got {sorted(left)} besides")


def merge_projections(qkv: Tensor, gate: Tensor, num_heads: int) -> Tensor:
    """``in_proj.weight`` out of the two weights of :class:`lasp.LightningAttention`."""
    q_k_v, gates = qkv.unflatten(0, (num_heads, -1)), gate.unflatten(0, (num_heads, -1))
    return torch.cat((q_k_v, gates), dim=1).flatten(0, 1)


def split_projections(merged: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`merge_projections`."""
    by_head = merged.unflatten(0, (num_heads, 4, -1))
    return by_head[:, :3].flatten(0, 2), by_head[:, 3].flatten(0, 1)
