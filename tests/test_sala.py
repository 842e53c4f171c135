"""The hybrid decoder is MiniCPM-SALA, transcribed token by token in float64 from published files.

Sources: arXiv:2602.11761; ``config.json`` and ``modeling_minicpm_sala.py`` of openbmb/MiniCPM-SALA,
read through the ports to vLLM and SGLang, which agree. The transcription calls nothing of this
project: weights have the names of the released files, a state is carried from token to token, a
query meets the keys before it one head at a time. Softmax layers are those of contexts below
``dense_len``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lasp.hybrid import (
    MINICPM_SALA,
    HybridConfig,
    HybridModel,
    Residuals,
    ResidualScale,
    pack_batch,
)
from tests.closeness import assert_equal_to_rounding

# config.json in small; what has no size is as released.
RELEASED = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "lightning_nh": 4,
    "lightning_head_dim": 6,
    "vocab_size": 20,
    "intermediate_size": 24,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 4,
    "mixer_types": ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4", "lightning-attn"],
}
LENGTHS = (19, 1, 0, 26)


def ours() -> HybridConfig:
    """The preset at these sizes."""
    r, num_layers = RELEASED, len(RELEASED["mixer_types"])
    scale = ResidualScale(beta=r["scale_depth"] / num_layers**0.5)
    return replace(
        MINICPM_SALA,
        num_layers=num_layers,
        vocab_size=r["vocab_size"],
        attention=replace(
            MINICPM_SALA.attention,
            num_heads=r["num_attention_heads"],
            num_kv_heads=r["num_key_value_heads"],
            head_dim=r["head_dim"],
        ),
        dense=replace(
            MINICPM_SALA.dense, hidden_size=r["hidden_size"], ffn_size=r["intermediate_size"]
        ),
        pattern="".join("*" if name == "minicpm4" else "G" for name in r["mixer_types"]),
        lightning=replace(MINICPM_SALA.lightning, rotary_dim=r["lightning_head_dim"]),
        vocabulary=replace(
            MINICPM_SALA.vocabulary, logit_scale=r["dim_model_base"] / r["hidden_size"]
        ),
        residuals=Residuals("pre", scale, scale, scale),
    )


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + RELEASED["rms_norm_eps"])


def rope(x: Tensor, position: int) -> Tensor:
    """``x cos + rotate_half(x) sin`` of one head of one token."""
    half = len(x) // 2
    angles = [position * RELEASED["rope_theta"] ** (-2 * i / len(x)) for i in range(half)] * 2
    cos, sin = (torch.tensor([f(a) for a in angles], dtype=x.dtype) for f in (math.cos, math.sin))
    return x * cos + torch.cat((-x[half:], x[:half])) * sin


def lightning(w: dict[str, Tensor], tokens: list[Tensor]) -> list[Tensor]:
    """The state of head h shrinks by ``exp(-2^(-8 (h + 1) / H))`` a token."""
    heads, dim = RELEASED["lightning_nh"], RELEASED["lightning_head_dim"]
    states, outputs = [torch.zeros(dim, dim, dtype=torch.float64)] * heads, []
    for position, x in enumerate(tokens):
        q, k, v, gate = ((w[f"{n}_proj.weight"] @ x).view(heads, dim) for n in "qkvz")
        mixed = []
        for h in range(heads):
            key = rope(rms_norm(k[h], w["k_norm.weight"]), position)
            query = rope(rms_norm(q[h], w["q_norm.weight"]), position)
            decay = math.exp(-(2.0 ** (-8 * (h + 1) / heads)))
            states[h] = decay * states[h] + torch.outer(key, v[h])
            mixed.append(query @ states[h] / dim**0.5)
        normed = rms_norm(torch.cat(mixed), w["o_norm.weight"])
        outputs.append(w["o_proj.weight"] @ (normed * torch.sigmoid(gate.flatten())))
    return outputs


def minicpm4(w: dict[str, Tensor], tokens: list[Tensor]) -> list[Tensor]:
    """Grouped-query attention without positions, and a sigmoid gate."""
    heads, kv_heads = RELEASED["num_attention_heads"], RELEASED["num_key_value_heads"]
    dim = RELEASED["head_dim"]
    keys, values, outputs = [], [], []
    for x in tokens:
        keys.append((w["k_proj.weight"] @ x).view(kv_heads, dim))
        values.append((w["v_proj.weight"] @ x).view(kv_heads, dim))
        q, mixed = (w["q_proj.weight"] @ x).view(heads, dim), []
        for h in range(heads):
            of = h // (heads // kv_heads)
            scores = torch.stack([q[h] @ key[of] for key in keys]) / dim**0.5
            mixed.append(sum(p * v[of] for p, v in zip(torch.softmax(scores, 0), values)))
        gate = torch.sigmoid(w["o_gate.weight"] @ x)
        outputs.append(w["o_proj.weight"] @ (torch.cat(mixed) * gate))
    return outputs


def their_logits(weights: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits of one document, by the published formulas."""
    depth = RELEASED["scale_depth"] / math.sqrt(len(RELEASED["mixer_types"]))
    xs = [weights["model.embed_tokens.weight"][token] * RELEASED["scale_emb"] for token in tokens]
    for number, mixer in enumerate(RELEASED["mixer_types"]):
        prefix = f"model.layers.{number}."
        w = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        attention = {n.removeprefix("self_attn."): v for n, v in w.items()}
        mix = minicpm4 if mixer == "minicpm4" else lightning
        mixed = mix(attention, [rms_norm(x, w["input_layernorm.weight"]) for x in xs])
        xs = [x + y * depth for x, y in zip(xs, mixed)]
        for index, x in enumerate(xs):
            y = rms_norm(x, w["post_attention_layernorm.weight"])
            y = F.silu(w["mlp.gate_proj.weight"] @ y) * (w["mlp.up_proj.weight"] @ y)
            xs[index] = x + (w["mlp.down_proj.weight"] @ y) * depth
    width = RELEASED["hidden_size"] / RELEASED["dim_model_base"]
    normed = [rms_norm(x, weights["model.norm.weight"]) / width for x in xs]
    return torch.stack([weights["lm_head.weight"] @ x for x in normed])


def released_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights, or gradients, as the released files name and lay them out."""
    named = {}
    for name, value in values.items():
        softmax = name.startswith("layers.") and ours().kinds[int(name.split(".")[1])] == "*"
        for our_part, theirs in (
            ("embedding.", "model.embed_tokens."),
            ("final_norm.", "model.norm."),
            ("layers.", "model.layers."),
            ("attention_norm.", "input_layernorm."),
            ("moe_norm.", "post_attention_layernorm."),
            ("attention.norm.", "attention.o_norm."),
            ("out_proj.", "o_proj."),
            ("output_gate.", "o_gate." if softmax else "z_proj."),
            (".attention.", ".self_attn."),
        ):
            name = name.replace(our_part, theirs)
        name = name.replace("head.", "lm_head.") if name.startswith("head.") else name
        stem, _, last = name.rpartition(".")
        if last == "w13":
            named[f"{stem}.gate_proj.weight"], named[f"{stem}.up_proj.weight"] = value
        elif last == "w2":
            named[f"{stem}.down_proj.weight"] = value
        elif stem.endswith("qkv_proj"):
            for part, of_part in zip("qkv", value.unflatten(0, (4, 3, -1)).unbind(1)):
                named[f"{stem.replace('qkv', part)}.weight"] = of_part.flatten(0, 1)
        else:
            named[name] = value
    return named


def test_logits_and_every_gradient() -> None:
    model = HybridModel(ours(), dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name
            parameter.normal_(float(norm), 0.3)
    tokens = torch.randint(RELEASED["vocab_size"], (sum(LENGTHS),))
    weights = {
        name: value.clone().requires_grad_()
        for name, value in released_names(dict(model.state_dict())).items()
    }
    expected = torch.cat(
        [their_logits(weights, ids.tolist()) for ids in tokens.split(LENGTHS) if len(ids)]
    )
    batch = pack_batch([LENGTHS], dp_rank=0, num_ranks=1, order="contiguous")
    actual = model(tokens, batch).logits
    assert_equal_to_rounding(actual, expected, tolerance=1e-14)
    (actual * expected.detach().sin()).sum().backward()
    (expected * expected.detach().sin()).sum().backward()
    gradients = released_names({n: p.grad for n, p in model.named_parameters()})
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        assert_equal_to_rounding(gradients[name], weight.grad, tolerance=1e-14, what=name)


def test_contexts_that_are_block_sparse_there_are_refused() -> None:
    config = replace(ours(), attention=replace(ours().attention, dense_len=8))
    model = HybridModel(config)
    model(torch.arange(14), pack_batch([(7, 7)], dp_rank=0, num_ranks=1, order="contiguous"))
    with pytest.raises(ValueError, match=r"attention.dense_len must be None or above 8 tokens"):
        model(torch.arange(14), pack_batch([(6, 8)], dp_rank=0, num_ranks=1, order="contiguous"))
    assert MINICPM_SALA.attention.dense_len == 8192
