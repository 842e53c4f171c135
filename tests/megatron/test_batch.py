"""Batches that Megatron hands to layers: packs in any order of the layout, cut over cp ranks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from lasp.hybrid import pack_batch
from lasp.megatron import PackedSequence, layout_of, shard_batch, share_packs
from lasp.sequence.layout import SequenceLayout
from tests.megatron.attention import megatrons_pack
from tests.megatron.cpu import initialize
from tests.ranks import refusal, run_on_ranks

pytestmark = pytest.mark.megatron

ORDERS = ("contiguous", "zigzag", "fold", "document_zigzag")


def batch_of(num_tokens: int) -> dict[str, Tensor | None]:
    """As Megatron's get_batch makes it, positions running on over the documents."""
    positions = torch.arange(num_tokens).unsqueeze(0)
    return {
        "tokens": positions + 100,
        "labels": positions + 101,
        "loss_mask": torch.rand(1, num_tokens),
        "attention_mask": None,
        "position_ids": positions,
    }


def with_padding(layout: SequenceLayout, x: Tensor) -> Tensor:
    """``[1, S]`` of a pack ``[1, tokens]``: zeros after every document."""
    documents = x.split(layout.document_lengths, dim=1)
    return torch.cat([F.pad(d, (0, n)) for d, n in zip(documents, layout.padding_lengths)], 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_parts_of_the_ranks_are_the_pack(order: Any, tp_size: int, padded: bool) -> None:
    lengths = (13, 1, 0, 20, 7)
    packed = PackedSequence.of(
        pack_batch([lengths], dp_rank=0, num_ranks=2, tp_size=tp_size, order=order)
    )
    layout, num_tokens = packed.layout, sum(lengths)
    batch = batch_of(num_tokens)
    mask = batch["loss_mask"]
    if padded:
        batch = {n: None if x is None else with_padding(layout, x) for n, x in batch.items()}
    parts = [shard_batch(batch, packed, cp_rank=rank) for rank in range(2)]
    for part in parts:
        assert part.keys() == batch.keys()
        assert part["attention_mask"] is None
    whole = batch_of(num_tokens)
    whole["position_ids"] = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    whole["loss_mask"] = mask
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        joined = layout.unshard([part[name] for part in parts], dim=1)
        assert torch.equal(joined, whole[name]), name
        if name != "position_ids":
            assert sum(int((part[name] != 0).sum()) for part in parts) == num_tokens, name
    assert sum(part["tokens"].numel() for part in parts) % (2 * tp_size) == 0


def megatrons_parts(num_tokens: int) -> tuple[dict[str, Any], dict[str, Any]]:
    groups = initialize(cp=2)
    torch.manual_seed(1)
    batch = batch_of(num_tokens)
    options = {"cp_group": groups.cp}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:  # from 0.18
        options["is_hybrid_cp"] = False
    packed = PackedSequence(layout=SequenceLayout((num_tokens,), 2, "zigzag"))
    ours = shard_batch(batch, packed, cp_rank=groups.cp.rank())
    return ours, get_batch_on_this_cp_rank(batch, **options)


def test_one_document_in_zigzag_order_is_cut_as_megatron_cuts_it() -> None:
    for ours, theirs in run_on_ranks(megatrons_parts, 2, 16):
        assert ours.keys() == theirs.keys()
        assert ours.pop("attention_mask") is theirs.pop("attention_mask") is None
        for name, values in theirs.items():
            assert torch.equal(ours[name], values), name


def test_stages_without_tensors_and_without_tokens() -> None:
    packed = PackedSequence(layout=SequenceLayout((5, 3), 2))
    empty = dict.fromkeys(batch_of(8))
    assert shard_batch(empty, packed, cp_rank=0) == empty
    last = {"labels": torch.arange(8).unsqueeze(0)}  # nothing to pad: no loss mask needed
    part = shard_batch(last, packed, cp_rank=1)
    assert part["labels"].tolist() == [[4, 5, 6, 7]]
    assert part["position_ids"].tolist() == [[4, 0, 1, 2]]


def test_what_holds_no_tokens_is_passed_on() -> None:
    """Megatron's lengths by name, whatever their sizes: as many as the tokens here."""
    packed = PackedSequence(layout=SequenceLayout((1, 1, 1, 1, 3), 2))
    cumulative = torch.tensor([[0, 1, 2, 3, 4, 7, 7]])
    without_tokens = {
        "cu_seqlens": cumulative,
        "cu_seqlens_padded": cumulative,
        "max_seqlen": torch.tensor([3]),
        "dataset_id": torch.tensor([[5]]),
        "local_cp_size": torch.tensor(2, dtype=torch.int32),
        "temperature": torch.tensor(0.5),
        "step": 3,
        "source": "books",
        "attention_mask": None,
    }
    batch = batch_of(7) | without_tokens
    part = shard_batch(batch, packed, cp_rank=1)
    assert part.keys() == batch.keys()
    for name, value in without_tokens.items():
        assert part[name] is value, name
    assert "position_ids" not in shard_batch(without_tokens, packed, cp_rank=0)


def test_features_of_tokens_are_cut_along_the_tokens() -> None:
    packed = PackedSequence(layout=SequenceLayout((5, 2), 2))
    teacher = torch.randn(1, 7, 4, 2)
    parts = [
        shard_batch(batch_of(7) | {"teacher": teacher}, packed, cp_rank=rank)["teacher"]
        for rank in range(2)
    ]
    assert torch.equal(packed.layout.unshard(parts, dim=1), teacher)
    assert parts[0].shape == (1, 4, 4, 2)


def test_batches_that_are_refused() -> None:
    packed = PackedSequence(layout=SequenceLayout((5, 2), 2))
    batch = batch_of(7)
    for changes, names in (
        ({"attention_mask": torch.zeros(1, 1, 7, 7)}, "attention_mask must be None"),
        ({"loss_mask": None}, "loss_mask must come with labels"),
        ({"tokens": torch.zeros(1, 6)}, r"tokens must be \[1, 7, ...\], or \[1, 8, ...\]"),
        ({"tokens": torch.zeros(2, 7)}, "tokens must be"),
        ({"tokens": torch.zeros(7)}, "tokens must be"),
        ({"logits": torch.zeros(7, 1, 3)}, "logits must be"),
        ({"weights": torch.zeros(3)}, "weights must be"),
    ):
        with pytest.raises(ValueError, match=names):
            shard_batch(batch | changes, packed, cp_rank=0)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\)"):
        shard_batch(batch, packed, cp_rank=2)


def shared_on_rank() -> list[str]:
    """What two replicas are told if the second one's pack cannot be read."""
    groups, told = initialize(), []
    for wrong in ({}, {"packed_seq_params": None}, {"packed_cut": "any"}):
        packed = megatrons_pack(SequenceLayout((5, 7), 1))
        given = {"packed_seq_params": packed, "packed_cut": None}
        if groups.dp.rank() == 1:
            packed.cu_seqlens_q = packed.cu_seqlens_q[None]
            given |= wrong
        told.append(refusal(share_packs, **given, pg_collection=groups))
    return told


def test_a_pack_that_one_replica_cannot_read_is_refused_by_all() -> None:
    reasons = ("squeeze the dim of the batch", "packed_seq_params must be of", "packed_cut must be")
    for told in run_on_ranks(shared_on_rank, 2):
        for error, reason in zip(told, reasons):
            assert "got by rank {1:" in error
            assert reason in error


def test_packed_sequence_is_what_megatron_expects() -> None:
    packed = PackedSequence(layout=SequenceLayout((5, 0, 4), 2, "zigzag"))
    assert isinstance(packed, PackedSeqParams)
    assert packed.qkv_format == "thd"
    assert packed.cu_seqlens_q.tolist() == [0, 5, 5, 9, 12]  # the padding is a document
    assert packed.max_seqlen_q == 5
    packed = PackedSequence(layout=SequenceLayout((5, 0, 4), 2, "document_zigzag"))
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_kv.tolist() == [0, 5, 5, 9]
    assert packed.cu_seqlens_q_padded.tolist() == [0, 8, 8, 12]  # as Megatron's RoPE counts
    assert packed.max_seqlen_q == 8
    with pytest.raises(ValueError, match="layout must be a SequenceLayout"):
        PackedSequence()


def test_megatrons_own_batches() -> None:
    rows = layout_of(None, 8, 2)
    assert (rows.document_lengths, rows.order) == ((16,), "zigzag")
    assert layout_of(None, 8, 2) is rows  # its device tensors are made once
    borders = torch.tensor([0, 3, 8], dtype=torch.int32)
    theirs = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    assert layout_of(theirs, 8, 1).document_lengths == (3, 5)
    theirs.cu_seqlens_q_padded = torch.tensor([0, 4, 9], dtype=torch.int32)
    padded = layout_of(theirs, 9, 1)
    assert (padded.document_lengths, padded.padded_lengths) == ((3, 5), (4, 5))
    with pytest.raises(ValueError, match="must be a PackedSequence with context parallelism"):
        layout_of(theirs, 9, 2)


@pytest.mark.parametrize("lengths", [[(5, 3, 1), (4, 9)], [(1,), (30, 0)], [(17, 2), (0, 19)]])
@pytest.mark.parametrize("order", ORDERS)
def test_packs_divide_over_sequence_parallel_ranks(lengths: Any, order: Any) -> None:
    """Every real token has one place in the order, in pack order over the replicas."""
    packs = [
        pack_batch(lengths, dp_rank=dp, num_ranks=2, tp_size=2, order=order) for dp in range(2)
    ]
    token_order = packs[0].token_order
    assert token_order == packs[1].token_order
    first = 0
    for dp_rank, packed in enumerate(packs):
        real = sum(lengths[dp_rank])
        places = torch.arange(first, first + real)
        first += real
        for cp_rank in range(2):
            chunks = packed.layout.shard(places, cp_rank, pad_value=-1).chunk(2)
            for tp_rank, chunk in enumerate(chunks):
                rank = dp_rank * 4 + cp_rank * 2 + tp_rank
                expected = torch.full_like(chunk, -1)
                for start, offset, length in token_order.segments[rank]:
                    expected[offset : offset + length] = torch.arange(start, start + length)
                assert torch.equal(chunk, expected)
                assert token_order.rows_per_rank[rank] == len(chunk)
