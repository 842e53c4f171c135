"""Flags and numbers of another type are refused where a config or layer is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lasp import LightningAttention, LightningOptions, RopeScaling, SequenceLayout, decay_rates
from lasp.generation import Sampling
from lasp.hybrid import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    LatentConfig,
    VocabularyConfig,
    keep_activations,
    next_in_document,
    pack_batch,
)
from moe_parallel import (
    DenseLayer,
    ExpertParallelMoE,
    MoEConfig,
    RouterConfig,
    RoutingReplay,
    TokenOrder,
    TokenSequences,
)
from ring import MultiLatentAttention, RingAttention

YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=64)
LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}


def heads(**changes: Any) -> AttentionConfig:
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rotary_dim": 4}
    return AttentionConfig(**(sizes | changes))


def latent(**changes: Any) -> LatentConfig:
    return LatentConfig(**(LATENT | changes))


def experts(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"hidden_size": 8, "ffn_size": 8, "num_experts": 4, "top_k": 2} | changes))


def ring(**changes: Any) -> RingAttention:
    sizes = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "rotary_dim": 4}
    return RingAttention(**({"hidden_size": 16} | sizes | changes))


def ring_latent(**changes: Any) -> MultiLatentAttention:
    return MultiLatentAttention(**({"hidden_size": 16, "num_heads": 2} | LATENT | changes))


def lightning(**changes: Any) -> LightningAttention:
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "layer_index": 0, "num_layers": 2}
    return LightningAttention(**(sizes | changes))


def pack(**changes: Any) -> object:
    sizes = {"document_lengths": [[5]], "dp_rank": 0, "num_ranks": 1, "order": "contiguous"}
    return pack_batch(**(sizes | changes))


CONFIG = HybridConfig(2, 32, heads(), experts(), "G*")
MODEL = HybridModel(CONFIG).eval()
CACHE = MODEL.new_cache(num_slots=1, max_tokens=8)


def generate(**changes: Any) -> object:
    return MODEL.generate(**({"prompts": [[1]], "max_new_tokens": 1} | changes))


def step(**changes: Any) -> object:
    return MODEL.step(**({"cache": CACHE, "slots": [-1], "tokens": [[1]]} | changes))


def save(**changes: Any) -> object:
    return MODEL.save_pretrained("nowhere", **changes)


FLAGS: list[tuple[Callable[..., object], str]] = [
    *((LightningOptions, n) for n in ("qk_norm", "gate_first", "qkv_bias", "gate_bias")),
    (LightningOptions, "out_bias"),
    *((VocabularyConfig, name) for name in ("tied", "float32_head")),
    *((RouterConfig, name) for name in ("normalize", "expert_bias")),
    *((experts, name) for name in ("pad_to_capacity", "static_shapes", "shared_gate")),
    (latent, "rope_interleaved"),
    *((ring, name) for name in ("qk_norm", "gated", "causal", "sinks")),
    *((ring_latent, name) for name in ("rope_interleaved", "gate", "causal")),
    *((step, name) for name in ("draft", "every_token")),
    (generate, "graph"),
    (save, "float32_routers"),
]


@pytest.mark.parametrize(("make", "name"), FLAGS)
@pytest.mark.parametrize("value", ["no", None, 0])
def test_flags_are_true_or_false(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["qk_norm", "gated"])
def test_flags_of_attention(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        heads(**{name: "no"})
    with pytest.raises(ValueError, match="truncate must be True or False, got 'no'"):
        RopeScaling("linear", 2.0, truncate="no")  # type: ignore[arg-type]


PARTS: list[tuple[Callable[..., object], str]] = [
    (lambda **k: HybridModel(**({"config": CONFIG} | k)), "config"),
    *((lambda **k: HybridModel(CONFIG, **k), name) for name in ("groups", "symmetric_memory")),
    (lambda **k: ExpertParallelMoE(**k), "config"),
    *((lambda **k: ExpertParallelMoE(experts(), **k), n) for n in ("groups", "symmetric_memory")),
    (lambda **k: DenseLayer(ffn_size=8, **k), "config"),
    (lightning, "options"),
    (experts, "router"),
    (generate, "sampling"),
    (lambda **k: keep_activations(policy="none", **k), "model"),
]


@pytest.mark.parametrize(("make", "name"), PARTS)
@pytest.mark.parametrize("value", ["yes", [1.0, 2.0], 2.5, True])
def test_parts_are_of_their_type(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be of type"):
        make(**{name: value})


SIZES: list[tuple[Callable[..., object], str]] = [
    *((lightning, name) for name in ("hidden_size", "num_heads", "head_dim", "num_layers")),
    *((ring, name) for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim")),
    *((ring_latent, name) for name in ("hidden_size", "kv_lora_rank", "q_lora_rank")),
    *((latent, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim")),
    *((heads, name) for name in ("num_heads", "num_kv_heads", "head_dim")),
    *((experts, name) for name in ("hidden_size", "top_k", "max_rows", "shared_ffn_size")),
    *((generate, name) for name in ("max_new_tokens", "chunk_tokens")),
    (Sampling, "top_k"),
    (save, "shard_bytes"),
    (lambda **k: MODEL.new_cache(**({"num_slots": 1, "max_tokens": 8} | k)), "max_tokens"),
    (lambda **k: decay_rates(2, 0, 2, **k), "tp_size"),
    (pack, "tp_size"),
]


@pytest.mark.parametrize(("make", "name"), SIZES)
@pytest.mark.parametrize("value", ["yes", [1.0, 2.0], 2.5, True, -1])
def test_sizes_are_integers(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer >= "):
        make(**{name: value})


def test_other_arguments_of_another_type() -> None:
    router = RouterConfig(sequence_loss_coefficient=0.1)
    layer, layout = ExpertParallelMoE(experts(router=router)), SequenceLayout((1,), 1)
    for match, call in (
        ("tokens must be ids", lambda: generate(prompts="yes")),
        ("tokens must be ids", lambda: generate(prompts=2.5)),
        ("tokens must be ids", lambda: step(tokens=["yes"])),
        ("stop_tokens must be integers", lambda: generate(stop_tokens="yes")),
        ("suppressed must be integers", lambda: Sampling(suppressed="yes")),
        ("temperature must be a finite number >= 0", lambda: Sampling("hot")),
        ("top_p must be", lambda: Sampling(top_p="most")),
        ("scaling must be a finite number", lambda: RouterConfig(scaling="yes")),
        ("z_loss_coefficient must be", lambda: RouterConfig(z_loss_coefficient="yes")),
        ("capacity_factor must be", lambda: experts(capacity_factor="yes")),
        ("cache must be one of this model", lambda: step(cache="yes")),
        ("layer_index must be in", lambda: lightning(layer_index="yes")),
        ("tp_rank be in", lambda: decay_rates(2, 0, 2, tp_rank="yes")),
        ("dp_rank must be in", lambda: pack(dp_rank="yes")),
        ("document_lengths must hold", lambda: pack(document_lengths=2.5)),
        ("policy must be names", lambda: keep_activations(MODEL, True)),
        ("tokens must be of type Tensor", lambda: MODEL([1] * 5, pack())),
        ("experts must be of type Tensor or None", lambda: RoutingReplay([[0, 1]])),
        ("replay must be of type", lambda: layer(torch.ones(2, 8), replay="yes")),
        ("sequences must be of type", lambda: layer(torch.ones(2, 8), sequences="yes")),
        (
            "sequences.numbers must be of type Tensor",
            lambda: layer(torch.ones(2, 8), sequences=TokenSequences([0, 0], 1)),
        ),
        ("segments must hold", lambda: TokenOrder("yes", (1,))),
        ("segments must hold", lambda: TokenOrder([[1]], [1])),
        ("rows_per_rank must be integers", lambda: TokenOrder([[(0, 0, 1)]], [1.5])),
        ("rows_per_rank must be integers", lambda: TokenOrder([[(0, 0, 1)]], [True])),
        ("rows_per_rank must be integers", lambda: TokenOrder.contiguous([True])),
        ("x must be of type Tensor", lambda: next_in_document([1], layout, pad_value=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_numbers_are_numbers() -> None:
    with pytest.raises(ValueError, match="scale must be a finite number, got 'auto'"):
        LightningOptions(scale="auto")  # type: ignore[arg-type]
    for rotary_dim in (None, 4.0, "4", True):
        with pytest.raises(ValueError, match=f"rotary_dim must be even .* got {rotary_dim!r}"):
            ring(rotary_dim=rotary_dim)
        with pytest.raises(ValueError, match=f"rotary_dim must be even .* got {rotary_dim!r}"):
            heads(rotary_dim=rotary_dim)
        with pytest.raises(ValueError, match=f"rotary_dim must be .* got {rotary_dim!r}"):
            LightningOptions(rotary_dim=rotary_dim)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [LightningOptions, heads, ring, ring_latent])
def test_yarn_needs_a_base_above_1(make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"rope_base must be above 1 .* got 1\.0"):
        make(rope_base=1.0, rope_scaling=YARN)
