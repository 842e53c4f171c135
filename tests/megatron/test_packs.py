"""Packs of Megatron's own loaders over context-parallel ranks: the cut is named, never guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from lasp.megatron import PackedSequence, layout_of, lightning_attention_spec
from lasp.sequence.layout import SequenceLayout
from ring.megatron import RingCoreAttention, ring_attention_spec
from tests.closeness import assert_equal_to_rounding
from tests.megatron.attention import (
    HEAD_DIM,
    HIDDEN,
    LENGTHS,
    LIGHTNING,
    RING,
    ROTARY,
    Case,
    megatrons_pack,
    parallel_config,
)
from tests.megatron.cpu import gathered, initialize, summed
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

ORDERS = {"document_zigzag": "document_zigzag", "row_zigzag": "zigzag"}
CUTS = pytest.mark.parametrize("cut", ORDERS)


def with_cut(case: Case, cut: str | None) -> Case:
    return case._replace(
        spec=lightning_attention_spec(packed_cut=cut)
        if case is LIGHTNING
        else ring_attention_spec(**ROTARY, packed_cut=cut)
    )


@CUTS
@pytest.mark.parametrize("case", [LIGHTNING, RING], ids=["lightning", "ring"])
@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [(2, {"cp": 2}), pytest.param(4, {"tp": 2, "cp": 2}, marks=pytest.mark.slow)],
)
def test_parts_equal_the_plain_module(case: Case, cut: str, num_ranks: int, sizes: Any) -> None:
    """Documents of any length; padding holds sevens, gets no gradient and gives none."""
    with_cut(case, cut).check(num_ranks, sizes, LENGTHS, ORDERS[cut], megatrons=True)


PADDED = [(5, 4, 3), (8, 4, 4)]


def padded_core(mask: str, sizes: dict[str, int], cut: str | None) -> tuple[Tensor, ...]:
    """Output and gradients of the core attention, of the documents' tokens, over a padded pack."""
    groups = initialize(**sizes)
    cp = groups.cp.size()
    layout = SequenceLayout(PADDED[0], cp, "document_zigzag", PADDED[1])
    config = parallel_config(sizes)
    part = RingCoreAttention(
        config, 1, AttnMaskType[mask], "self", pg_collection=groups, packed_cut=cut
    )
    part.positions_of_layout = True
    qkv = torch.randn(3, 12, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    local = layout.shard(qkv, groups.cp.rank(), dim=1, pad_value=100.0).requires_grad_()
    output = part(*local, packed_seq_params=megatrons_pack(layout)).unflatten(-1, (2, 8))
    output.backward(layout.shard(qkv[0].cos(), groups.cp.rank()))
    parts = gathered(output.detach(), groups.cp), gathered(local.grad.transpose(0, 1), groups.cp)
    return tuple(layout.unshard(ranks) for ranks in parts)


def attended(mask: str) -> tuple[Tensor, ...]:
    """The same, each document alone, dense."""
    qkv = torch.randn(
        3, 12, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    outputs = []
    for q, k, v in zip(*(x.split(PADDED[0]) for x in qkv)):
        scores = torch.einsum("qhd,khd->hqk", q, k) / 8**0.5
        if mask == "causal":
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    output = torch.cat(outputs)
    output.backward(qkv[0].detach().cos())
    return output.detach(), qkv.grad.transpose(0, 1)


@pytest.mark.parametrize("mask", ["causal", "no_mask"])
@pytest.mark.parametrize(
    ("num_ranks", "sizes", "cut"), [(1, {}, None), (2, {"cp": 2}, "document_zigzag")]
)
def test_no_token_attends_to_padding(mask: str, num_ranks: int, sizes: Any, cut: Any) -> None:
    expected = attended(mask)
    for result in run_on_ranks(padded_core, num_ranks, mask, sizes, cut):
        for mine, theirs in zip(result, expected, strict=True):
            assert_equal_to_rounding(mine, theirs)


def rotated_by_megatron(sizes: dict[str, int], ours: bool) -> tuple[Tensor, ...]:
    """Megatron's self-attention, with its own RoPE, around our core attention."""
    groups = initialize(**sizes)
    core = ModuleSpec(RingCoreAttention, params={"packed_cut": "document_zigzag"})
    spec = ModuleSpec(
        module=SelfAttention,
        submodules=SelfAttentionSubmodules(ColumnParallelLinear, core, RowParallelLinear),
        params={"attn_mask_type": AttnMaskType.causal},
    )
    torch.manual_seed(4)
    config = parallel_config(sizes)
    module = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    layout = SequenceLayout(LENGTHS, groups.cp.size(), "document_zigzag", (16, 4, 0, 20, 8))
    packed = PackedSequence(layout=layout) if ours else megatrons_pack(layout)
    rope = RotaryEmbedding(HEAD_DIM, 1.0, use_cpu_initialization=True, cp_group=groups.cp)
    frequencies = rope(20, packed_seq=True)
    pack = torch.randn(sum(LENGTHS), 1, HIDDEN, dtype=torch.float64)
    hidden = layout.shard(pack, groups.cp.rank()).requires_grad_()
    output, _ = module(hidden, None, rotary_pos_emb=frequencies, packed_seq_params=packed)
    output.backward(layout.shard(pack.cos(), groups.cp.rank()))
    weights = [summed(parameter.grad, groups.cp) for parameter in module.parameters()]
    tokens = (layout.unshard(gathered(x, groups.cp)) for x in (output.detach(), hidden.grad))
    return (*tokens, *weights)


@pytest.mark.parametrize("ours", [False, True], ids=["megatrons", "ours"])
def test_megatrons_rope_is_right_for_zigzag_in_every_document(ours: bool) -> None:
    """Packs of Megatron, and of ours in that order."""
    (expected,) = run_on_ranks(rotated_by_megatron, 1, {}, False)
    for result in run_on_ranks(rotated_by_megatron, 2, {"cp": 2}, ours):
        for mine, theirs in zip(result, expected, strict=True):
            assert_equal_to_rounding(mine, theirs)


@CUTS
def test_a_rank_has_the_tokens_that_loaders_give_it(cut: str) -> None:
    """Zigzag in every document, or over the row: pieces r and 2 cp - 1 - r of 2 cp."""
    lengths = (8, 12, 4) if cut == "document_zigzag" else (7, 12, 5)
    pack = torch.arange(24)
    layout = layout_of(megatrons_pack(SequenceLayout(lengths, 1)), 12, 2, packed_cut=cut)
    for rank in range(2):
        wholes = pack.split(lengths) if cut == "document_zigzag" else [pack]
        pieces = [whole.chunk(4) for whole in wholes]
        expected = torch.cat([piece for four in pieces for piece in (four[rank], four[3 - rank])])
        assert torch.equal(layout.shard(pack, rank), expected)


def borders(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def pack_of(q: Tensor, **named: Any) -> PackedSeqParams:
    return PackedSeqParams(qkv_format="thd", **({"cu_seqlens_q": q, "cu_seqlens_kv": q} | named))


def test_a_layout_is_made_once_for_a_pack_and_again_for_other_lengths() -> None:
    pack = pack_of(borders(0, 4, 8))
    layout = layout_of(pack, 4, 2, packed_cut="row_zigzag")
    assert layout_of(pack, 4, 2, packed_cut="row_zigzag") is layout
    assert layout_of(pack, 4, 2, packed_cut="document_zigzag") != layout
    pack.cu_seqlens_q[1] = 8
    assert layout_of(pack, 4, 2, packed_cut="row_zigzag").document_lengths == (8, 0)
    pack.cu_seqlens_q = pack.cu_seqlens_kv = borders(0, 2, 8)
    assert layout_of(pack, 4, 2, packed_cut="row_zigzag").document_lengths == (2, 6)


@pytest.mark.parametrize(
    ("pack", "cut", "names"),
    [
        (pack_of(borders(0, 4, 8)), None, "PackedSequence .*, or packed_cut named, got Packed"),
        (pack_of(borders(0, 6, 8)), "document_zigzag", "padded_lengths must be multiples of 4"),
        (pack_of(borders(0, 4, 12)), "row_zigzag", "must be of 4 tokens a rank, .* got 6"),
        (pack_of(borders(0, 4, 8)[None]), "row_zigzag", r"cu_seqlens_q must be \[documents \+ 1\]"),
        (
            pack_of(borders(0, 4, 8), cu_seqlens_kv=borders(0, 6, 8)),
            "row_zigzag",
            r"cu_seqlens_kv must be cu_seqlens_q, padded or not, got",
        ),
    ],
)
def test_packs_that_are_refused(pack: PackedSeqParams, cut: Any, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        layout_of(pack, 4, 2, packed_cut=cut)


def unknown_cut() -> None:
    groups, config = initialize(), parallel_config({})
    for spec in (
        lightning_attention_spec(packed_cut="zigzag"),
        ring_attention_spec(rotary_dim=4, packed_cut="zigzag"),
    ):
        with pytest.raises(ValueError, match="packed_cut must be None or one of"):
            build_module(spec, config=config, layer_number=1, pg_collection=groups)


def test_unknown_cuts_are_refused() -> None:
    run_on_ranks(unknown_cut, 1)
