"""Oracle of the hybrid decoder: written from the paper's equations over the three oracles.

It shares with the decoder the names of the parameters and the three ``reference.py``, nothing else:
norms, residuals, gates, rotary embedding and the order of the sub-layers are written again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lasp.hybrid import HybridConfig, Residuals, ResidualScale, RopeScaling
from lasp.layers.options import LightningOptions
from lasp.lightning.decay import decay_rates
from lasp.lightning.reference import recurrent_lightning_attention
from moe_parallel.reference import reference_moe
from ring.reference import dense_attention


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotate(
    x: Tensor, positions: Tensor, dim: int, base: float, scaling: RopeScaling | None = None
) -> Tensor:
    """Rotate pairs (i, i + dim / 2) as complex numbers; the rest of the head passes."""
    pairs = torch.complex(x[..., : dim // 2], x[..., dim // 2 : dim])
    speeds = [base ** (-2 * i / dim) for i in range(dim // 2)]
    size = 1.0
    if scaling is not None:
        speeds = [speed * slowed(scaling, i, dim, base) for i, speed in enumerate(speeds)]
        size = magnitude(scaling, scaling.mscale or 1) if scaling.rope_type == "yarn" else 1.0
        size /= magnitude(scaling, scaling.mscale_all_dim or 0)
    angles = positions[:, None] * torch.tensor(speeds, dtype=torch.float64)
    turned = size * pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag, x[..., dim:]], -1)


def slowed(scaling: RopeScaling, i: int, dim: int, base: float) -> float:
    """YaRN's factor of pair i: between 1, from ``beta_fast`` turns on, and 1 / factor."""
    if scaling.rope_type == "linear":
        return 1 / scaling.factor
    length = scaling.original_max_position_embeddings

    def pair_of(turns: float) -> float:
        return dim / 2 * math.log(length / (2 * math.pi * turns), base)

    first = max(math.floor(pair_of(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_of(scaling.beta_slow)), dim - 1)
    share = min(max((i - first) / (last - first or 0.001), 0), 1)
    return share / scaling.factor + 1 - share


def magnitude(scaling: RopeScaling, mscale: float) -> float:
    return 0.1 * mscale * math.log(scaling.factor) + 1


def reference_lightning(
    options: LightningOptions,
    p: dict[str, Tensor],
    x: Tensor,
    rates: Tensor,
    lengths: Sequence[int],
) -> Tensor:
    """A lightning layer of any options over whole documents ``[S, hidden]``, in float64."""
    heads = len(rates)
    qkv = (x @ p["qkv_proj.weight"].T + p.get("qkv_proj.bias", 0)).unflatten(1, (heads, 3, -1))
    q, k, v = (F.silu(qkv) if options.activation == "silu" else qkv).unbind(2)
    if options.qk_norm:
        q, k = (
            rms_norm(y, p[f"{n}_norm.weight"], options.norm_eps) for n, y in (("q", q), ("k", k))
        )
    positions = torch.cat([torch.arange(length) for length in lengths])
    rope = (options.rotary_dim, options.rope_base, options.rope_scaling)
    q, k = (rotate(y, positions, *rope) for y in (q, k))
    borders = list(accumulate(lengths, initial=0))
    y, _ = recurrent_lightning_attention(q, k, v, rates, cu_seqlens=borders)
    y = (q.shape[-1] ** -0.5 if options.scale is None else options.scale) * y.flatten(1)
    gate = torch.ones(())
    if options.gate != "none":
        gate = x @ p["output_gate.weight"].T + p.get("output_gate.bias", 0)
        gate = torch.sigmoid(gate) * (gate if options.gate == "silu" else 1)
    if options.gate_first:
        y = y * gate
    weights = p["norm.weight"].chunk(options.norm_groups)
    groups = zip(y.chunk(options.norm_groups, 1), weights)
    y = torch.cat([rms_norm(group, weight, options.norm_eps) for group, weight in groups], 1)
    y = y if options.gate_first else y * gate
    return y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


class ReferenceLogits(NamedTuple):
    """Logits ``[S, vocab]`` of the next token and of the one after, and the auxiliary loss."""

    logits: Tensor
    aux_loss: Tensor
    mtp_logits: Tensor | None = None


def reference_logits(
    config: HybridConfig,
    p: dict[str, Tensor],
    tokens: Tensor,
    lengths: tuple[int, ...],
    inputs_embeds: Tensor | None = None,
) -> ReferenceLogits:
    """The model over a whole pack, in float64."""

    def embed(ids: Tensor) -> Tensor:
        return p["embedding.weight"][ids] * config.vocabulary.embedding_scale

    def logits_of(x: Tensor) -> Tensor:
        head = p["embedding.weight" if config.vocabulary.tied else "head.weight"]
        return config.vocabulary.logit_scale * (x @ head.T)

    x, aux_loss = embed(tokens) if inputs_embeds is None else inputs_embeds, torch.zeros(())
    for layer, kind in enumerate(config.kinds):
        counted = config.num_decay_layers or config.num_layers
        rates = decay_rates(
            config.attention.num_heads, layer, counted, of_layer(config.decay, layer)
        )
        x, more = reference_layer(config, part_of(p, f"layers.{layer}."), x, lengths, kind, rates)
        aux_loss = aux_loss + more
    x = rms_norm(x, p["final_norm.weight"], config.norm_eps)
    if config.mtp_loss_weight is None:
        return ReferenceLogits(logits_of(x), aux_loss)
    # The embedding of the token behind each, that of token 0 behind the last of a document.
    documents = tokens.split(lengths)
    following = torch.cat([F.pad(ids[1:], (0, 1))[: len(ids)] for ids in documents])
    embedded = rms_norm(embed(following), p["mtp.token_norm.weight"], config.norm_eps)
    y = rms_norm(x, p["mtp.hidden_norm.weight"], config.norm_eps)
    y = torch.cat((embedded, y), 1) @ p["mtp.projection.weight"].T
    y, more = reference_layer(config, part_of(p, "mtp.layer."), y, lengths, "*", rates)
    y = rms_norm(y, p["mtp.final_norm.weight"], config.norm_eps)
    return ReferenceLogits(logits_of(x), aux_loss + more, logits_of(y))


def of_layer(decay: Any, layer: int) -> Any:
    """The formula, or the rates of a layer."""
    return decay if isinstance(decay, str) else torch.tensor(decay[layer], dtype=torch.float64)


def part_of(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): w for name, w in p.items() if name.startswith(prefix)}


def reference_layer(
    config: HybridConfig,
    w: dict[str, Tensor],
    x: Tensor,
    lengths: tuple[int, ...],
    kind: str,
    rates: Tensor,
) -> tuple[Tensor, Tensor]:
    """One layer with the weights ``w``, and its auxiliary loss."""
    deepnorm = ResidualScale((2 * config.num_layers) ** 0.25)
    own = config.residuals or Residuals("post", deepnorm, deepnorm, deepnorm)
    a, aux_loss = part_of(w, "attention."), torch.zeros(())
    residual, x = x, rms_norm(x, w["attention_norm.weight"], config.norm_eps)
    if own.norm == "post":
        residual = x
    if kind == "*":
        alpha, beta = own.softmax
        softmax = reference_latent if config.attention.latent else reference_softmax
        y = softmax(config, a, x, lengths)
    else:
        alpha, beta = own.lightning
        y = reference_lightning(config.lightning, a, x, rates, lengths)
    residual = alpha * residual + beta * y
    x = rms_norm(residual, w["moe_norm.weight"], config.norm_eps)
    if own.norm == "post":
        residual = x
    if "mlp.w13" in w:
        gate, up = x @ w["mlp.w13"].mT
        y = (F.silu(gate) * up) @ w["mlp.w2"].T
    else:
        y, aux_loss, _ = reference_moe(
            x,
            w["moe.gate.weight"],
            w["moe.experts.w13"],
            w["moe.experts.w2"],
            top_k=config.moe.top_k,
            capacity_factor=config.moe.capacity_factor,
            aux_loss_coefficient=config.moe.aux_loss_coefficient,
            router=config.moe.router,
            shared=[w[f"moe.shared.{n}"] for n in ("w13", "w2") if f"moe.shared.{n}" in w],
        )
    alpha, beta = own.mlp
    return alpha * residual + beta * y, aux_loss


def reference_softmax(
    config: HybridConfig, p: dict[str, Tensor], x: Tensor, lengths: Sequence[int]
) -> Tensor:
    """A softmax layer over whole documents ``[S, hidden]``, in float64."""
    heads = config.attention
    positions = torch.cat([torch.arange(length) for length in lengths])
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(1, (-1, heads.head_dim)) for n in "qkv")
    if heads.qk_norm:
        q = rms_norm(q, p["q_norm.weight"], config.norm_eps)
        k = rms_norm(k, p["k_norm.weight"], config.norm_eps)
    rope = (heads.rotary_dim, heads.rope_base, heads.rope_scaling)
    q, k = (rotate(y, positions, *rope) for y in (q, k))
    borders = list(accumulate(lengths, initial=0))
    scale = heads.head_dim**-0.5
    y, _ = dense_attention(q, k, v, cu_seqlens=borders, causal=True, scale=scale)
    gate = torch.sigmoid(x @ p["output_gate.weight"].T) if heads.gated else 1
    return (y.flatten(1) * gate) @ p["o_proj.weight"].T


def reference_latent(
    config: HybridConfig, p: dict[str, Tensor], x: Tensor, lengths: Sequence[int]
) -> Tensor:
    """A multi-head latent attention layer over whole documents ``[S, hidden]``, in float64."""
    sizes, heads = config.attention.latent, config.attention.num_heads
    scaling = config.attention.rope_scaling
    positions = torch.cat([torch.arange(length) for length in lengths])

    def rotated(y: Tensor) -> Tensor:
        if sizes.rope_interleaved:
            y = torch.cat((y[..., 0::2], y[..., 1::2]), -1)
        return rotate(y, positions, sizes.qk_rope_head_dim, config.attention.rope_base, scaling)

    compressed = rms_norm(x @ p["q_a_proj.weight"].T, p["q_a_layernorm.weight"], config.norm_eps)
    q = (compressed @ p["q_b_proj.weight"].T).unflatten(1, (heads, -1))
    own, shared = q.split((sizes.qk_nope_head_dim, sizes.qk_rope_head_dim), -1)
    q = torch.cat((own, rotated(shared)), -1)
    latent = x @ p["kv_a_proj_with_mqa.weight"].T
    latent, shared = latent.split((sizes.kv_lora_rank, sizes.qk_rope_head_dim), -1)
    latent = rms_norm(latent, p["kv_a_layernorm.weight"], config.norm_eps)
    kv = (latent @ p["kv_b_proj.weight"].T).unflatten(1, (heads, -1))
    own, v = kv.split((sizes.qk_nope_head_dim, sizes.v_head_dim), -1)
    k = torch.cat((own, rotated(shared[:, None]).expand(-1, heads, -1)), -1)
    borders, scale = list(accumulate(lengths, initial=0)), q.shape[-1] ** -0.5
    if scaling is not None:
        scale *= magnitude(scaling, scaling.mscale_all_dim or 0) ** 2
    y, _ = dense_attention(q, k, v, cu_seqlens=borders, causal=True, scale=scale)
    return y.flatten(1) @ p["o_proj.weight"].T
