"""Ring attention as the core of Megatron's own self-attention; see test_attention.py too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor

from lasp.megatron import PackedSequence
from lasp.sequence.layout import SequenceLayout
from ring.megatron import RingCoreAttention, ring_attention_spec
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import HEAD_DIM, HEADS, HIDDEN, config, parallel_config
from tests.megatron.cpu import initialize
from tests.megatron.cpu import train_on_cpu as on_cpu
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def megatrons_spec(core: type, mask: str, norm: type | None = None) -> ModuleSpec:
    linears = (ColumnParallelLinear, core, RowParallelLinear)
    return ModuleSpec(
        module=SelfAttention,
        submodules=SelfAttentionSubmodules(*linears, q_layernorm=norm, k_layernorm=norm),
        params={"attn_mask_type": AttnMaskType[mask]},
    )


def core_in_megatrons_attention(core: type, mask: str, **options: Any) -> list[Tensor]:
    """Megatron's SelfAttention around a core attention, on one rank."""
    groups = initialize()
    torch.manual_seed(4)
    spec, layer_number = megatrons_spec(core, mask), options.pop("layer_number", 1)
    module = build_module(
        spec, config=config(**options), layer_number=layer_number, pg_collection=groups
    )
    hidden = torch.randn(12, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(12, 1, 1, HEAD_DIM // 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    attention_mask = causal if mask == "causal" else None
    with on_cpu():  # where Megatron makes the mask of a window
        output, _ = module(hidden, attention_mask, rotary_pos_emb=angles)
    leaves = [hidden, *module.parameters()]
    return [output.detach(), *torch.autograd.grad((output * hidden.detach()).sum(), leaves)]


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
def test_core_attention_is_megatrons_on_one_rank(mask: str) -> None:
    (ours,) = run_on_ranks(core_in_megatrons_attention, 1, RingCoreAttention, mask)
    (theirs,) = run_on_ranks(core_in_megatrons_attention, 1, DotProductAttention, mask)
    for actual, expected in zip(ours, theirs, strict=True):
        # Megatron's softmax is float32 inside.
        assert_equal_to_rounding(actual, expected, tolerance=16 * torch.finfo(torch.float32).eps)


WINDOW: dict[str, Any] = {"window_size": (3, 0)}
OPTIONS: dict[str, dict[str, Any]] = {
    "window": WINDOW,
    "window of both sides": {"window_size": (2, 4), "mask": "no_mask"},
    "window of another layer": {
        "window_size": (3, 0),
        "window_attn_skip_freq": 2,
        "layer_number": 2,
    },
    "listed window": {
        "window_size": (3, 0),
        "window_attn_skip_freq": [0, 1, 0, 0, 0],
        "layer_number": 2,
    },
    "learnable sinks": {"softmax_type": "learnable"},
    "off-by-one": {"softmax_type": "off-by-one", "window_size": (5, 0)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_windows_and_sinks_are_megatrons_on_one_rank(name: str) -> None:
    options = {"mask": "causal"} | OPTIONS[name]
    (ours,) = run_on_ranks(core_in_megatrons_attention, 1, RingCoreAttention, **options)
    (theirs,) = run_on_ranks(core_in_megatrons_attention, 1, DotProductAttention, **options)
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal_to_rounding(actual, expected, tolerance=16 * torch.finfo(torch.float32).eps)


def self_attention(ours: bool, no_rope: bool) -> list[Tensor]:
    """A layer with norms of queries and keys, and RoPE over all of each head, on one rank."""
    groups = initialize()
    options = config(qk_layernorm=True, no_rope_freq=[1, 0, 0, 0, 0], layernorm_epsilon=0.1)
    spec = ring_attention_spec(rotary_dim=HEAD_DIM, rope_base=100.0)
    if not ours:
        spec = megatrons_spec(DotProductAttention, "causal", WrappedTorchNorm)
    torch.manual_seed(4)
    number = 1 if no_rope else 2
    module = build_module(spec, config=options, layer_number=number, pg_collection=groups).double()
    for name, parameter in module.named_parameters():
        torch.manual_seed(len(name))
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(12, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
    angles = (torch.arange(12).double()[:, None] * frequencies).repeat(1, 2)[:, None, None]
    with on_cpu():
        output, _ = module(hidden, None, **({} if ours else {"rotary_pos_emb": angles}))
    named = dict(module.named_parameters())
    leaves = [hidden, *(named[name] for name in sorted(named))]
    return [output.detach(), *torch.autograd.grad((output * hidden.detach()).sum(), leaves)]


@pytest.mark.parametrize("no_rope", [True, False])
def test_norms_and_layers_without_rope_are_megatrons_on_one_rank(no_rope: bool) -> None:
    (ours,), (theirs,) = (run_on_ranks(self_attention, 1, x, no_rope) for x in (True, False))
    for actual, expected in zip(ours, theirs, strict=True):
        assert_equal_to_rounding(actual, expected, tolerance=16 * torch.finfo(torch.float32).eps)


def sinks_over_tp() -> dict[str, Any]:
    """The sinks of this rank's heads, whether Megatron counts them once, and their checkpoint."""
    groups = initialize(tp=2)
    spec = ring_attention_spec(rotary_dim=0)
    options = parallel_config({"tp": 2}, softmax_type="learnable")
    module = build_module(spec, config=options, layer_number=1, pg_collection=groups)
    sharded = module.sharded_state_dict(metadata={"dp_cp_group": groups.cp})
    (found,) = (x for name, x in sharded.items() if name.endswith("softmax_offset"))
    sinks = module.core_attention.softmax_offset
    return {
        "shape": tuple(sinks.shape),
        "cut": sinks.tensor_model_parallel,
        "whole": tuple(found.global_shape),
        "offset": tuple(found.global_offset),
    }


def test_sinks_are_cut_over_tensor_parallel_ranks() -> None:
    for rank, found in enumerate(run_on_ranks(sinks_over_tp, 2)):
        expected = {"shape": (HEADS // 2,), "cut": True, "whole": (HEADS,)}
        assert found == expected | {"offset": (rank * HEADS // 2,)}


def packed_core(spec: ModuleSpec, without_rope: bool) -> Tensor:
    groups = initialize(cp=2)
    torch.manual_seed(4)
    module = build_module(
        spec, config=parallel_config({"cp": 2}), layer_number=1, pg_collection=groups
    )
    if without_rope:
        module.core_attention.positions_of_layout = True
    layout = SequenceLayout((5, 1, 10), 2, "fold")
    torch.manual_seed(5)
    pack = torch.randn(16, 1, HIDDEN, dtype=torch.float64)
    hidden = layout.shard(pack, groups.cp.rank())
    output, _ = module(hidden, None, packed_seq_params=PackedSequence(layout=layout))
    return output.detach()


def test_core_attention_without_rope_takes_packs_over_ranks() -> None:
    """Its owner says so; with Megatron's RoPE there is a row of tests/megatron/refusals.py."""
    actual = run_on_ranks(packed_core, 2, megatrons_spec(RingCoreAttention, "causal"), True)
    expected = run_on_ranks(packed_core, 2, ring_attention_spec(rotary_dim=0), False)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
