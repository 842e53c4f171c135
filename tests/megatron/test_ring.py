"""Ring attention as the core of Megatron's own self-attention; see test_attention.py too."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from lasp.megatron import PackedSequence
from lasp.sequence.layout import SequenceLayout
from ring.megatron import RingCoreAttention, ring_attention_spec
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import HEAD_DIM, HIDDEN, config, parallel_config
from tests.megatron.cpu import initialize
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron


def megatrons_spec(core: type, mask: str) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        submodules=SelfAttentionSubmodules(ColumnParallelLinear, core, RowParallelLinear),
        params={"attn_mask_type": AttnMaskType[mask]},
    )


def core_in_megatrons_attention(core: type, mask: str) -> list[Tensor]:
    """Megatron's SelfAttention around a core attention, on one rank."""
    groups = initialize()
    torch.manual_seed(4)
    spec = megatrons_spec(core, mask)
    module = build_module(spec, config=config(), layer_number=1, pg_collection=groups)
    hidden = torch.randn(12, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(12, 1, 1, HEAD_DIM // 2, dtype=torch.float64).repeat(1, 1, 1, 2)
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).triu(1)
    attention_mask = causal if mask == "causal" else None
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
