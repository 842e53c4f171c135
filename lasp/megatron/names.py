"""Names and layouts of the plain hybrid model's weights, and of those of Megatron's GPTModel.

``to_megatron`` and ``to_plain`` rename and lay out whole weights, or gradients, without ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lasp._core.checks import check_part, check_sizes
from lasp.megatron.multi_token import INNER

# One to one: names in lasp.hybrid.HybridModel and in GPTModel.
_OF_MODEL = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "head.weight": "output_layer.weight",
    "mtp.token_norm.weight": "mtp.layers.0.enorm.weight",
    "mtp.hidden_norm.weight": "mtp.layers.0.hnorm.weight",
    "mtp.projection.weight": "mtp.layers.0.eh_proj.weight",
    "mtp.final_norm.weight": "mtp.layers.0.final_layernorm.weight",
}
# The layer of multi-token prediction is named as layer 0 of a model of its own.
_PREDICTING = ("mtp.layer.", "layers.0.")
_PREDICTING_MERGED = (f"mtp.layers.0.{INNER}.", "decoder.layers.0.")
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
DENSE_MERGED = "mlp.linear_fc1.weight"


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
    check_part("weights", weights, Mapping)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    check_sizes(**heads)
    left, named = dict(weights), {}
    if predicting := _taken(left, *_PREDICTING):
        named = _with(to_megatron(predicting, **heads), *reversed(_PREDICTING_MERGED))
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
            named[merged + DENSE_MERGED] = left.pop(prefix + _DENSE).flatten(0, 1)
    _check_nothing_left(left, "lasp.hybrid.HybridModel")
    return named


def to_plain(
    weights: Mapping[str, Tensor], *, num_heads: int, num_kv_heads: int, gated: bool = False
) -> dict[str, Tensor]:
    """Inverse of :func:`to_megatron`; ``gated`` is whether softmax layers have an output gate.

    Raises:
        ValueError: for a name that a GPTModel of hybrid layers does not have.
    """
    check_part("weights", weights, Mapping)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    check_sizes(**heads)
    left, named = dict(weights), {}
    if predicting := _taken(left, *_PREDICTING_MERGED):
        named = _with(to_plain(predicting, **heads, gated=gated), *reversed(_PREDICTING))
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
        if merged + DENSE_MERGED in left:
            named[prefix + _DENSE] = left.pop(merged + DENSE_MERGED).unflatten(0, (2, -1))
    _check_nothing_left(left, "a GPTModel of hybrid layers")
    return named


def _taken(left: dict[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    """What begins with a prefix, taken out, with another in its place."""
    names = [name for name in left if name.startswith(prefix)]
    return {other + name.removeprefix(prefix): left.pop(name) for name in names}


def _with(named: dict[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    """Names with another prefix."""
    return {other + name.removeprefix(prefix): value for name, value in named.items()}


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
