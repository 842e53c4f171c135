"""Flags and numbers of another type are refused where a config or layer is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lasp import LightningOptions, RopeScaling
from lasp.hybrid import AttentionConfig, LatentConfig, VocabularyConfig
from moe_parallel import MoEConfig, RouterConfig
from ring import MultiLatentAttention, RingAttention

YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=64)


def heads(**changes: Any) -> AttentionConfig:
    return AttentionConfig(**({"num_heads": 2, "num_kv_heads": 1, "head_dim": 8} | changes))


def latent(**changes: Any) -> LatentConfig:
    return LatentConfig(8, 8, 8, 8, **changes)


def experts(**changes: Any) -> MoEConfig:
    return MoEConfig(hidden_size=8, ffn_size=8, num_experts=4, top_k=2, **changes)


def ring(**changes: Any) -> RingAttention:
    return RingAttention(16, 2, 1, 8, **({"rotary_dim": 4} | changes))


def ring_latent(**changes: Any) -> MultiLatentAttention:
    sizes = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    return MultiLatentAttention(16, 2, **sizes, **changes)


FLAGS: list[tuple[Callable[..., object], str]] = [
    *((LightningOptions, n) for n in ("qk_norm", "gate_first", "qkv_bias", "gate_bias")),
    (LightningOptions, "out_bias"),
    *((VocabularyConfig, name) for name in ("tied", "float32_head")),
    *((RouterConfig, name) for name in ("normalize", "expert_bias")),
    *((experts, name) for name in ("pad_to_capacity", "shared_gate")),
    (latent, "rope_interleaved"),
    *((ring, name) for name in ("qk_norm", "gated", "causal", "sinks")),
    *((ring_latent, name) for name in ("rope_interleaved", "gate", "causal")),
]


@pytest.mark.parametrize(("make", "name"), FLAGS)
@pytest.mark.parametrize("value", ["no", None, 0])
def test_flags_are_true_or_false(make: Callable[..., object], name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got {value!r}"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["qk_norm", "gated"])
def test_flags_of_attention(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be True or False, got 'no'"):
        heads(rotary_dim=4, **{name: "no"})
    with pytest.raises(ValueError, match="truncate must be True or False, got 'no'"):
        RopeScaling("linear", 2.0, truncate="no")  # type: ignore[arg-type]


def test_numbers_are_numbers() -> None:
    with pytest.raises(ValueError, match="scale must be a finite number, got 'auto'"):
        LightningOptions(scale="auto")  # type: ignore[arg-type]
    for rotary_dim in (None, 4.0, "4", True):
        with pytest.raises(ValueError, match=f"rotary_dim must be even .* got {rotary_dim!r}"):
            ring(rotary_dim=rotary_dim)
        with pytest.raises(ValueError, match=f"rotary_dim must be even .* got {rotary_dim!r}"):
            heads(rotary_dim=rotary_dim)
        with pytest.raises(ValueError, match=f"rotary_dim must be even .* got {rotary_dim!r}"):
            LightningOptions(rotary_dim=rotary_dim).check_heads(2, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [LightningOptions, lambda **k: heads(rotary_dim=4, **k), ring, ring_latent]
)
def test_yarn_needs_a_base_above_1(make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"rope_base must be above 1 .* got 1\.0"):
        make(rope_base=1.0, rope_scaling=YARN)
