"""Multi-head latent attention as Megatron's self-attention: as its own, and over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from lasp.megatron.version import VERSION
from ring import MultiLatentAttention
from ring.megatron import RingCoreAttention, ring_latent_attention_spec
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import HEADS, HIDDEN, LENGTHS, Case, config
from tests.megatron.cpu import initialize, train_on_cpu
from tests.ranks import refusal, run_on_ranks

pytestmark = pytest.mark.megatron
SIZES: dict[str, Any] = {
    "q_lora_rank": 6, "kv_lora_rank": 8, "qk_head_dim": 4, "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6, "num_query_groups": HEADS, "rope_type": "rope", "rotary_base": 100.0,
    "layernorm_epsilon": 0.1, "qk_layernorm": True,
}  # fmt: skip


class DenseCore(DotProductAttention):
    """Megatron's, which needs to be told that it does not need the widths."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def megatrons_spec(core: type, q_norm: type, kv_norm: type) -> ModuleSpec:
    """Megatron's MLA around a core attention, which gets keys and values."""
    return ModuleSpec(
        module=MLASelfAttention,
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=core,
            linear_proj=RowParallelLinear,
            q_layernorm=q_norm,
            kv_layernorm=kv_norm,
        ),
        params={"attn_mask_type": AttnMaskType.causal},
    )


def on_one_rank(spec: ModuleSpec, **options: Any) -> list[Tensor]:
    groups = initialize()
    torch.manual_seed(4)
    chosen = config(**(SIZES | options))
    module = build_module(spec, config=chosen, layer_number=1, pg_collection=groups).double()
    for name, parameter in module.named_parameters():
        torch.manual_seed(len(name))
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(12, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    with train_on_cpu():
        output, _ = module(hidden, None)
    named = dict(module.named_parameters())
    leaves = [hidden, *(named[name] for name in sorted(named))]
    return [output.detach(), *torch.autograd.grad((output * hidden.detach()).sum(), leaves)]


@pytest.mark.parametrize(
    ("options", "norms"),
    [
        ({}, (WrappedTorchNorm, WrappedTorchNorm)),
        (
            {
                "rope_type": "yarn",
                "rotary_scaling_factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "mscale": 0.9,
                "mscale_all_dim": 0.7,
            },
            (WrappedTorchNorm, WrappedTorchNorm),
        ),
        (
            {
                "q_lora_rank": None,
                "qk_layernorm": False,
                "window_size": (4, 0),
                "softmax_type": "learnable",
            },
            (IdentityOp, IdentityOp),
        ),
    ],
)
def test_megatrons_own_on_one_rank(options: dict[str, Any], norms: tuple[type, type]) -> None:
    theirs, core, ours = (
        run_on_ranks(on_one_rank, 1, spec, **options)[0]
        for spec in (
            megatrons_spec(DenseCore, *norms),
            megatrons_spec(RingCoreAttention, *norms),
            ring_latent_attention_spec(),
        )
    )
    for expected, *actual in zip(theirs, core, ours, strict=True):
        for x in actual:  # Megatron's softmax and angles are float32 inside
            assert_equal_to_rounding(x, expected, tolerance=64 * torch.finfo(torch.float32).eps)


def plain(dtype: torch.dtype) -> MultiLatentAttention:
    torch.manual_seed(3)
    module = MultiLatentAttention(
        HIDDEN, HEADS, q_lora_rank=6, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
        v_head_dim=6, rope_base=100.0, rope_interleaved=True, norm_eps=0.1, dtype=torch.float64,
    )  # fmt: skip
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {
        "q_a_proj": "linear_q_down_proj",
        "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }
    return {f"{new}.weight": values[f"{old}.weight"] for old, new in renamed.items()}


LATENT = Case(ring_latent_attention_spec(), plain, names, SIZES)


@pytest.mark.parametrize(
    ("sizes", "lengths", "order"),
    [
        ({"cp": 2}, LENGTHS, "fold"),
        ({"cp": 2}, None, "zigzag"),
        ({"tp": 2}, LENGTHS, "contiguous"),
        ({"cp": 2, "tp": 2}, LENGTHS, "zigzag"),
    ],
)
def test_over_ranks(sizes: dict[str, int], lengths, order: str) -> None:
    num_ranks = sizes.get("cp", 1) * sizes.get("tp", 1)
    LATENT.check(num_ranks, sizes, lengths, order)


def build(tp: int = 1, **options: Any) -> None:
    groups = initialize(tp=tp)
    chosen = config(**(SIZES | options))
    build_module(ring_latent_attention_spec(), config=chosen, layer_number=1, pg_collection=groups)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_type": "longrope"},
        {"rotary_percent": 0.5},
        {"cache_mla_latents": True},
        {"no_rope_freq": [1, 0, 0, 0, 0]},
        {"multi_latent_attention": False},
        pytest.param(
            {"q_lora_rank": None},
            marks=pytest.mark.skipif(VERSION < (0, 19), reason="older versions build it"),
        ),
    ],
)
def test_options_that_it_does_not_have(options: dict[str, Any]) -> None:
    (message,) = run_on_ranks(refusal, 1, build, **options)
    assert f"config.{next(iter(options))} must be" in message


def test_tensor_parallel_ranks_need_sequence_parallelism() -> None:
    for message in run_on_ranks(refusal, 2, build, tp=2, tensor_model_parallel_size=2):
        assert "config.sequence_parallel must be True" in message
