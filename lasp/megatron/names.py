"""Names and layouts of the plain hybrid model's weights, and of those of Megatron's GPTModel.

``to_megatron`` and ``to_plain`` rename and lay out whole weights, or gradients, without ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
# Several to one, by head and by key head; of the latter the gate may be missing.
_LIGHTNING = ("attention.qkv_proj.weight", "attention.output_gate.weight")
_LIGHTNING_MERGED = "self_attention.in_proj.weight"
_SOFTMAX_GATE = "attention.output_gate.weight"
_SOFTMAX = (
    "attention.q_proj.weight", _SOFTMAX_GATE, "attention.k_proj.weight", "attention.v_proj.weight",
)  # fmt: skip
_SOFTMAX_MERGED = "self_attention.linear_qkv.weight"
# Norms of queries and keys have one name in the plain model, and Megatron's own in softmax layers.
_NORMS = ("attention.q_norm.weight", "attention.k_norm.weight")
_LIGHTNING_NORMS = ("self_attention.q_norm.weight", "self_attention.k_norm.weight")
_SOFTMAX_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
_DENSE = "mlp.w13"
DENSE_MERGED = "mlp.linear_fc1.weight"
_LAYERS = ("layers.", "decoder.layers.")


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
    left = dict(weights)
    named = _taken(left, *_PREDICTING)
    if named:
        named = _taken(to_megatron(named, **heads), *reversed(_PREDICTING_MERGED))
    named |= _renamed(left, 0)
    for index in _layers(left, "layers."):
        prefix, merged = f"layers.{index}.", f"decoder.layers.{index}."
        if prefix + _LIGHTNING[0] in left:
            qkv, gate = (left.pop(prefix + name) for name in _LIGHTNING)
            named[merged + _LIGHTNING_MERGED] = merge_projections(qkv, gate, num_heads)
        if prefix + _SOFTMAX[0] in left:
            names = [n for n in _SOFTMAX if n != _SOFTMAX_GATE or prefix + n in left]
            parts = [left.pop(prefix + name) for name in names]
            named[merged + _SOFTMAX_MERGED] = _merged(parts, num_kv_heads)
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
    left = dict(weights)
    named = _taken(left, *_PREDICTING_MERGED)
    if named:
        named = _taken(to_plain(named, **heads, gated=gated), *reversed(_PREDICTING))
    named |= _renamed(left, 1)
    for index in _layers(left, "decoder.layers."):
        prefix, merged = f"layers.{index}.", f"decoder.layers.{index}."
        if merged + _LIGHTNING_MERGED in left:
            parts = split_projections(left.pop(merged + _LIGHTNING_MERGED), num_heads)
            named |= {prefix + name: part for name, part in zip(_LIGHTNING, parts)}
        if merged + _SOFTMAX_MERGED in left:
            names = [name for name in _SOFTMAX if name != _SOFTMAX_GATE or gated]
            queries = num_heads // num_kv_heads
            shares = [queries] * (len(names) - 2) + [1, 1]
            split = _split(left.pop(merged + _SOFTMAX_MERGED), num_kv_heads, shares)
            named |= {prefix + name: part for name, part in zip(names, split)}
        if merged + DENSE_MERGED in left:
            named[prefix + _DENSE] = left.pop(merged + DENSE_MERGED).unflatten(0, (2, -1))
    _check_nothing_left(left, "a GPTModel of hybrid layers")
    return named


def _taken(left: dict[str, Tensor], prefix: str, other: str) -> dict[str, Tensor]:
    """What begins with a prefix, taken out, with another in its place."""
    names = [name for name in left if name.startswith(prefix)]
    return {other + name.removeprefix(prefix): left.pop(name) for name in names}


def _layers(weights: Mapping[str, Tensor], start: str) -> list[int]:
    rests = (name.removeprefix(start) for name in weights if name.startswith(start))
    return sorted({int(rest.partition(".")[0]) for rest in rests})


def _renamed(left: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """What is one to one, taken out: by plain names of ``side`` 0, by Megatron's of side 1."""
    pairs = [*_OF_MODEL.items()]
    for index in _layers(left, _LAYERS[side]):
        starts = [f"{start}{index}." for start in _LAYERS]
        of_layer = [*_OF_LAYER.items()]
        if starts[side] + next(iter(_OF_LATENT.items()))[side] in left:
            of_layer += _OF_LATENT.items()
        elif starts[0] + _SOFTMAX[0] in left:
            of_layer += zip(_NORMS, _SOFTMAX_NORMS)
        else:  # lightning, or by Megatron's names, which tell the two apart
            of_layer += zip(_NORMS * 2, _LIGHTNING_NORMS + _SOFTMAX_NORMS)
        pairs += [(starts[0] + ours, starts[1] + theirs) for ours, theirs in of_layer]
    return {pair[1 - side]: left.pop(pair[side]) for pair in pairs if pair[side] in left}


def _check_nothing_left(left: Mapping[str, Tensor], model: str) -> None:
    if left:
        raise ValueError(f"weights must be those of {model}, got {sorted(left)} besides")


def merge_projections(qkv: Tensor, gate: Tensor, num_heads: int) -> Tensor:
    """``in_proj.weight`` out of the two weights of :class:`lasp.LightningAttention`."""
    return _merged((qkv, gate), num_heads)


def split_projections(merged: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`merge_projections`."""
    qkv, gate = _split(merged, num_heads, (3, 1))
    return qkv, gate


def _merged(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Rows group by group, those of each part in turn."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def _split(merged: Tensor, groups: int, shares: Sequence[int]) -> list[Tensor]:
    """Inverse of :func:`_merged`, of parts whose rows are as ``shares``."""
    by_group = merged.unflatten(0, (groups, -1))
    size = by_group.shape[1] // sum(shares)
    parts = by_group.split([share * size for share in shares], dim=1)
    return [part.flatten(0, 1) for part in parts]
