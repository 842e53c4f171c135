"""The hybrid decoder is mlx-lm's Ling-2.5 and Ring-linear-2.0: oracles that others wrote.

They compute in float32 on the CPU, one document at a time.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    HybridModel,
    LatentConfig,
    Residuals,
    RopeScaling,
    pack_batch,
)
from lasp.layers.options import LightningOptions
from moe_parallel import MoEConfig, RouterConfig
from tests.closeness import relative_error

REASON = "needs mlx-lm: pip install --group oracles"
mx = pytest.importorskip("mlx.core", reason=REASON)
ling = pytest.importorskip("mlx_lm.models.bailing_hybrid", reason=REASON)
ring = pytest.importorskip("mlx_lm.models.bailing_moe_linear", reason=REASON)

HIDDEN, HEADS, DIM, VOCAB = 32, 4, 8, 40
LING = HybridConfig(
    num_layers=7,
    vocab_size=VOCAB,
    attention=AttentionConfig(
        HEADS, HEADS, DIM, 4, 600.0, latent=LatentConfig(12, 6, 4, 10, 16, rope_interleaved=True)
    ),
    moe=MoEConfig(
        HIDDEN,
        12,
        num_experts=16,
        top_k=4,
        router=RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=4, top_groups=2),
        shared_ffn_size=10,
    ),
    dense=DenseConfig(HIDDEN, 20, 1),
    pattern="GG*GG**",  # groups of three; a layer that fills no group is softmax
    lightning=LightningOptions("none", True, 4, 600.0, None, norm_groups=2),
    residuals=Residuals(),
    norm_eps=1e-6,
    decay="alibi",  # mlx-lm 0.32 subtracts nothing from the layer
)
SCALING = RopeScaling("yarn", 4.0, 32, mscale=1.0, mscale_all_dim=0.7)
LONGER = replace(
    LING,
    attention=replace(LING.attention, rope_scaling=SCALING),
    lightning=replace(LING.lightning, rope_scaling=SCALING),
)
RING = replace(
    LING,
    attention=AttentionConfig(HEADS, 2, DIM, 4, 600.0, qk_norm=True),
    decay="bailing_clamped",  # mlx-lm 0.32 subtracts 1, but not from layer 0
)


def theirs(config: HybridConfig) -> Any:
    moe = config.moe
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": config.dense.ffn_size,
        "moe_intermediate_size": moe.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": config.attention.num_kv_heads,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "num_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "layer_group_size": 3,
        "group_norm_size": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-6,
        "rope_theta": 600.0,
        "max_position_embeddings": 4096,
        "routed_scaling_factor": 2.5,
        "head_dim": DIM,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_size,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    latent, scaling = config.attention.latent, config.attention.rope_scaling
    sizes["rope_scaling"] = asdict(scaling) if scaling else None
    if latent is None:
        return ring.Model(ring.ModelArgs(model_type="bailing_moe_linear", **sizes))
    for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"):
        sizes[name] = getattr(latent, name)
    sizes["q_lora_rank"] = latent.q_lora_rank
    return ling.Model(ling.ModelArgs(model_type="bailing_hybrid", **sizes))


def released_names(model: HybridModel) -> dict[str, Tensor]:
    """Our weights as inclusionAI's files name and lay them out."""
    named = {}
    for name, value in model.state_dict().items():
        if name.endswith("qkv_proj.weight"):
            value = value.unflatten(0, (HEADS, 3, -1)).transpose(0, 1).flatten(0, 2)
        for ours, released in (
            ("embedding.", "model.word_embeddings."),
            ("final_norm.", "model.norm."),
            ("head.", "lm_head."),
            ("layers.", "model.layers."),
            ("attention_norm.", "input_layernorm."),
            ("moe_norm.", "post_attention_layernorm."),
            ("qkv_proj.", "query_key_value."),
            ("output_gate.", "g_proj."),
            ("attention.norm.", "attention.g_norm."),
            ("q_norm.", "query_layernorm."),
            ("k_norm.", "key_layernorm."),
            ("out_proj.", "dense."),
            ("o_proj.", "dense."),
            (".moe.", ".mlp."),
        ):
            name = name.replace(ours, released) if ours != "head." or name[:5] == ours else name
        stem, _, last = name.rpartition(".")
        if stem.endswith("experts"):
            parts = {f"{stem}.{e}": part for e, part in enumerate(value)}
        else:
            parts = {stem.replace(".shared", ".shared_experts"): value}
        for part_name, part in parts.items():
            if last == "w13":
                named[f"{part_name}.gate_proj.weight"], named[f"{part_name}.up_proj.weight"] = part
            elif last == "w2":
                named[f"{part_name}.down_proj.weight"] = part
            else:
                named[f"{part_name}.{last}"] = part
    for name in [name for name in named if name.endswith(".q_proj.weight")]:
        q, k, v = (named.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv")
        named[name.replace("q_proj", "query_key_value")] = torch.cat((q, k, v))
    return {name: value for name, value in named.items() if "tokens_per_expert" not in name}


@pytest.mark.parametrize(
    "config", [LING, LONGER, RING], ids=["Ling-2.5", "Ling-2.5 by YaRN", "Ring-linear-2.0"]
)
def test_logits_are_those_of_mlx(config: HybridConfig) -> None:
    model = HybridModel(config, dtype=torch.float64)
    model.reset_parameters(0)
    for name, value in model.state_dict().items():
        if "norm" in name:
            value.normal_(1.0, 0.2)
        if name.endswith("expert_bias"):
            value.uniform_(0.0, 0.2)
    single = model.state_dict()
    weights = {n: mx.array(v.float().numpy()) for n, v in released_names(model).items()}
    oracle = theirs(config)
    oracle.load_weights(list(oracle.sanitize(weights).items()))
    tokens, lengths = torch.randint(VOCAB, (50,)), (30, 1, 19)
    with mx.stream(mx.cpu):
        expected = torch.cat(
            [
                torch.tensor(oracle(mx.array(document[None].numpy()))[0].tolist())
                for document in tokens.split(lengths)
            ]
        )
    batch = pack_batch([lengths], dp_rank=0, num_ranks=1, order="contiguous")
    with torch.no_grad():
        exact = model(tokens, batch).logits
        float32 = HybridModel(config)
        float32.load_state_dict(single)
        ours = float32(tokens, batch).logits
    # Theirs differs from ours in float64 as ours in float32 does: by float32's rounding.
    assert relative_error(expected, exact) < 2e-6
    assert relative_error(ours, exact) < 2e-6
