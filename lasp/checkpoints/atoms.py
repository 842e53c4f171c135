"""The weights of a hybrid model in their smallest pieces, which every file format joins in its way.

An atom is one matrix or vector: the query projection of a layer, the gate projection of an expert.
``lasp.checkpoints.families`` says which tensor of a format holds which atoms; with all formats
written in atoms, any of them converts to any other.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp.hybrid.attention import AttentionConfig
from lasp.hybrid.config import HybridConfig
from lasp.layers.options import LightningOptions

Shape = tuple[int, ...]


class Atom(NamedTuple):
    """The name of an atom.

    Attributes:
        role: what it is, such as ``lightning.q`` or ``experts.gate``.
        layer: index of its layer, ``num_layers`` for the layer of multi-token prediction; None: of
            the model.
        expert: index of its expert; None: of no routed expert.
    """

    role: str
    layer: int | None = None
    expert: int | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return self.role + layer + ("" if self.expert is None else f", expert {self.expert}")


# What the model keeps in float32 whatever its dtype is, and files in the dtype of all else.
WIDE_ROLES = ("router", "head")
# What a trainer pads to a multiple of its ranks.
VOCABULARY_ROLES = ("embedding", "head")


def atoms_of(config: HybridConfig) -> dict[Atom, Shape]:
    """Every atom of a model and its shape, in the order of the model."""
    hidden = config.hidden_size
    found: dict[Atom, Shape] = {Atom("embedding"): (config.vocab_size, hidden)}
    for layer, kind in enumerate(config.kinds):
        found |= _layer(config, layer, kind, has_experts=config.has_experts(layer))
    found[Atom("final_norm")] = (hidden,)
    if not config.vocabulary.tied:
        found[Atom("head")] = (config.vocab_size, hidden)
    if config.mtp_loss_weight is not None:
        layer = config.num_layers
        for name in ("token_norm", "hidden_norm", "final_norm"):
            found[Atom(f"mtp.{name}", layer)] = (hidden,)
        found[Atom("mtp.projection", layer)] = (hidden, 2 * hidden)
        found |= _layer(config, layer, "*", has_experts=config.moe is not None)
    return found


def _layer(config: HybridConfig, layer: int, kind: str, *, has_experts: bool) -> dict[Atom, Shape]:
    hidden, heads = config.hidden_size, config.attention
    roles: dict[str, Shape] = {"attention_norm": (hidden,)}
    if kind == "G":
        roles |= _lightning(heads, config.lightning, hidden)
    elif heads.latent is None:
        roles |= _softmax(heads, hidden)
    else:
        roles |= _latent(heads, hidden)
    roles["mlp_norm"] = (hidden,)
    found = {Atom(role, layer): shape for role, shape in roles.items()}
    if has_experts:
        return found | _experts(config, layer)
    if config.dense is not None:
        found |= {
            Atom(f"mlp.{role}", layer): shape
            for role, shape in _swiglu(hidden, config.dense.ffn_size).items()
        }
    return found


def _lightning(heads: AttentionConfig, options: LightningOptions, hidden: int) -> dict[str, Shape]:
    inner, matrix = heads.num_heads * heads.head_dim, (heads.num_heads * heads.head_dim, hidden)
    roles: dict[str, Shape] = {"q": matrix, "k": matrix, "v": matrix}
    if options.qkv_bias:
        roles |= {f"{name}_bias": (inner,) for name in "qkv"}
    if options.gate != "none":
        roles["gate"] = matrix
        if options.gate_bias:
            roles["gate_bias"] = (inner,)
    if options.qk_norm:
        roles |= {"q_norm": (heads.head_dim,), "k_norm": (heads.head_dim,)}
    roles |= {"norm": (inner,), "out": (hidden, inner)}
    if options.out_bias:
        roles["out_bias"] = (hidden,)
    return {f"lightning.{role}": shape for role, shape in roles.items()}


def _softmax(heads: AttentionConfig, hidden: int) -> dict[str, Shape]:
    inner, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    roles: dict[str, Shape] = {"q": (inner, hidden), "k": (keys, hidden), "v": (keys, hidden)}
    roles["out"] = (hidden, inner)
    if heads.qk_norm:
        roles |= {"q_norm": (heads.head_dim,), "k_norm": (heads.head_dim,)}
    if heads.gated:
        roles["gate"] = (inner, hidden)
    return {f"softmax.{role}": shape for role, shape in roles.items()}


def _latent(heads: AttentionConfig, hidden: int) -> dict[str, Shape]:
    latent, count = heads.latent, heads.num_heads
    assert latent is not None
    queries = count * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
    rank, values = latent.kv_lora_rank, count * latent.v_head_dim
    roles: dict[str, Shape] = {"q": (queries, hidden)}
    if (q_rank := latent.q_lora_rank) is not None:
        roles = {"q_a": (q_rank, hidden), "q_a_norm": (q_rank,), "q_b": (queries, q_rank)}
    roles |= {"kv_a": (rank + latent.qk_rope_head_dim, hidden), "kv_a_norm": (rank,)}
    roles["kv_b"] = (count * latent.qk_nope_head_dim + values, rank)
    roles["out"] = (hidden, values)
    if heads.gated:
        roles["gate"] = (values, hidden)
    return {f"latent.{role}": shape for role, shape in roles.items()}


def _experts(config: HybridConfig, layer: int) -> dict[Atom, Shape]:
    moe = config.moe
    assert moe is not None
    found: dict[Atom, Shape] = {Atom("router", layer): (moe.num_experts, moe.hidden_size)}
    if moe.router.expert_bias:
        found[Atom("router_bias", layer)] = (moe.num_experts,)
    of_expert = _swiglu(moe.hidden_size, moe.ffn_size)
    for expert in range(moe.num_experts):
        for role, shape in of_expert.items():
            found[Atom(f"experts.{role}", layer, expert)] = shape
    if moe.shared_ffn_size is not None:
        for role, shape in _swiglu(moe.hidden_size, moe.shared_ffn_size).items():
            found[Atom(f"shared.{role}", layer)] = shape
        if moe.shared_gate:
            found[Atom("shared.scale", layer)] = (1, moe.hidden_size)
    return found


def _swiglu(hidden: int, ffn_size: int) -> dict[str, Shape]:
    return {"gate": (ffn_size, hidden), "up": (ffn_size, hidden), "down": (hidden, ffn_size)}
