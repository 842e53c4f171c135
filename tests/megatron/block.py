"""The hybrid block of the tests: its config, its plain twin, the same weights over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    HybridModel,
    LatentConfig,
    Residuals,
    ResidualScale,
    RopeScaling,
)
from lasp.layers.options import LightningOptions
from lasp.megatron import PackedCut, hybrid_block_spec, to_megatron
from moe_parallel import MoEConfig, RouterConfig
from tests.megatron.attention import (
    CUT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LING_OPTIONS,
    parallel_config,
)
from tests.megatron.cpu import gathered, summed

PACKS = ((13, 1, 0, 20, 6), (2, 37, 1))
TOKENS = sum(map(sum, PACKS))
LAYERS = 4
HYBRID = HybridConfig(
    num_layers=LAYERS,
    vocab_size=7,
    attention=AttentionConfig(HEADS, KV_HEADS, HEAD_DIM, rotary_dim=4, rope_base=100.0),
    moe=MoEConfig(HIDDEN, 8, 4, 2, capacity_factor=1.0, aux_loss_coefficient=0.1),
    pattern="1:1",
)
OPTIONS = {
    "num_layers": LAYERS,
    "linear_attention_freq": 2,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 8,
    "moe_aux_loss_coeff": 0.1,
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_token_dispatcher_type": "alltoall",
    "moe_expert_capacity_factor": 1.0,
    "moe_token_drop_policy": "position",
    "pipeline_dtype": torch.float64,
}


# Ring-linear in small: its layers of both kinds, pre-norm, a dense first layer, its experts.
RING = replace(
    HYBRID,
    attention=replace(HYBRID.attention, qk_norm=True, rope_scaling=RopeScaling("linear", 4.0)),
    moe=replace(
        HYBRID.moe,
        router=RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=2, top_groups=1),
        shared_ffn_size=4,
    ),
    dense=DenseConfig(HIDDEN, 8, 1),
    residuals=Residuals(),
    num_decay_layers=9,
    decay="bailing",
    lightning=LING_OPTIONS["options"],
)
RING_OPTIONS = {
    "qk_layernorm": True,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_shared_expert_intermediate_size": 4,
}

# Ling-2.5 in small: Ring-linear with latent attention, rotated by YaRN.
_YARN = RopeScaling("yarn", 4.0, 32, beta_fast=4.0, mscale=1.0, mscale_all_dim=0.7)
LING = replace(
    RING,
    attention=AttentionConfig(
        HEADS,
        HEADS,
        HEAD_DIM,
        rotary_dim=4,
        rope_base=100.0,
        rope_scaling=_YARN,
        latent=LatentConfig(8, 4, 4, 6, q_lora_rank=6, rope_interleaved=True),
    ),
    lightning=replace(RING.lightning, rope_scaling=_YARN),
)
LING_OPTIONS_OF_CONFIG = RING_OPTIONS | {
    "num_query_groups": HEADS,
    "kv_lora_rank": 8,
    "q_lora_rank": 6,
    "qk_head_dim": 4,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rotary_base": 100.0,
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}

# MiniCPM-SALA in small, its rates given. Embedding and head, and so their scales, are Megatron's.
_DEPTH = ResidualScale(beta=1.4 / 4**0.5)
SALA = HybridConfig(
    num_layers=LAYERS,
    vocab_size=7,
    attention=AttentionConfig(
        HEADS, KV_HEADS, HEAD_DIM, rotary_dim=0, gated=True, dense_len=TOKENS + 1
    ),
    moe=None,
    dense=DenseConfig(HIDDEN, 8),
    pattern="*GG*",
    lightning=LightningOptions("none", True, 6, scale=None),
    residuals=Residuals("pre", _DEPTH, _DEPTH, _DEPTH),
    decay=torch.arange(4 * HEADS).view(4, HEADS) / 7,
)
SALA_OPTIONS = {
    "attention_output_gate": True,
    "linear_attention_freq": [0, 1, 1, 0],
    "num_moe_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_expert_capacity_factor": None,
}

# What build_block takes for models other than MiniMax-01.
MODELS: dict[str, dict[str, Any]] = {
    "ring": RING_OPTIONS | {"hybrid": RING},
    "ling": LING_OPTIONS_OF_CONFIG | {"hybrid": LING},
    "sala": SALA_OPTIONS | {"hybrid": SALA},
}


def plain_model(hybrid: HybridConfig = HYBRID) -> HybridModel:
    model = HybridModel(hybrid, dtype=torch.float64)
    model.reset_parameters(0)
    return model


def megatron_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of the plain model's decoder layers under the names of Megatron's block."""
    named = to_megatron(values, num_heads=HEADS, num_kv_heads=KV_HEADS)
    return {n.removeprefix("decoder."): v for n, v in named.items() if n.startswith("decoder.")}


def cuts(name: str, groups: Any) -> list[tuple[Any, int]]:
    """How a parameter is cut: pairs of a process group and a dim."""
    if ".experts.w" in name:
        return [(groups.ep, 0), (groups.expt_tp, 2)]
    for part, dim in CUT.items():
        if f".{part}." in name:
            return [(groups.tp, dim)]
    return []


def build_block(
    sizes: dict[str, int],
    groups: Any,
    packed_cut: PackedCut | None = None,
    hybrid: HybridConfig = HYBRID,
    activations: str = "none",
    **options: Any,
) -> TransformerBlock:
    config = parallel_config(sizes, **(OPTIONS | options))
    stage, stages = groups.pp.rank(), groups.pp.size()
    block = TransformerBlock(
        config,
        hybrid_block_spec(config, hybrid, packed_cut=packed_cut, activations=activations),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        pg_collection=groups,
    )
    for name, parameter, part in own_parts(block, groups, hybrid):
        assert part.shape == parameter.shape, name
        parameter.data.copy_(part)
    return block


def own_parts(
    block: TransformerBlock, groups: Any, hybrid: HybridConfig
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each parameter of a block with its part of the plain model's."""
    weights = megatron_names(dict(plain_model(hybrid).named_parameters()))
    for name, parameter in block.named_parameters():
        part = by_halves(name, weights[global_name(name, block)])
        for group, dim in cuts(name, groups):
            part = part.chunk(group.size(), dim)[group.rank()]
        yield name, parameter, part.reshape(-1, part.shape[-1]) if ".linear_fc1." in name else part


def by_halves(name: str, weight: Tensor) -> Tensor:
    """A rank has rows of the gate and rows of the up projection of a dense MLP."""
    return weight.unflatten(0, (2, -1)) if ".linear_fc1." in name else weight


def global_name(name: str, block: TransformerBlock) -> str:
    head, _, rest = name.partition(".")
    if head != "layers":
        return name
    local, _, rest = rest.partition(".")
    return f"layers.{block.layers[int(local)].layer_number - 1}.{rest}"


def whole_gradient(name: str, parameter: torch.nn.Parameter, groups: Any) -> Tensor:
    """Summed over replicas and joined, as Megatron's DDP and finalize_model_grads sum it."""
    expert = ".experts.w" in name
    assert getattr(parameter, "allreduce", True) != expert
    grad = summed(parameter.grad, groups.expt_dp if expert else groups.dp_cp)
    if getattr(parameter, "sequence_parallel", False):
        grad = summed(grad, groups.tp)
    grad = by_halves(name, grad)
    for group, dim in reversed(cuts(name, groups)):
        grad = torch.cat(gathered(grad, group), dim)
    return grad.view(-1, grad.shape[-1]) if ".linear_fc1." in name else grad
