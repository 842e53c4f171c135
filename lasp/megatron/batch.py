"""Batches as Megatron hands them to a layer, and the layout of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from lasp.layout import SequenceLayout


@dataclass
class PackedSequence(PackedSeqParams):
    """A packed batch cut over the context-parallel ranks in any order of the layout.

    It is a PackedSeqParams, so Megatron hands it through layers, recompute and pipeline stages;
    our modules read the layout. Tokens on a rank are ``layout.shard(pack, cp_rank)``, ``[T, 1, h]``
    (with sequence parallelism T / tp of them). Build it once per micro-batch from host data.

    Attributes:
        layout: which tokens each context-parallel rank holds; required.
        token_order: a ``moe_parallel.TokenOrder`` over the ranks of all tensor, context and data
            parallel ranks, for capacity by position and for the auxiliary loss without padding.
            See ``lasp.megatron_hybrid.pack_sequences``.

    The fields of PackedSeqParams are filled from the layout, cumulative lengths on the CPU.
    """

    layout: SequenceLayout | None = None
    token_order: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.layout, SequenceLayout):
            raise ValueError(
                f"layout must be a SequenceLayout, got {self.layout!r}: build one from the"
                " document lengths and the size of the context-parallel group"
            )
        borders = torch.tensor(self.layout.borders, dtype=torch.int32)
        self.qkv_format = "thd"
        self.cu_seqlens_q = self.cu_seqlens_kv = borders
        self.max_seqlen_q = self.max_seqlen_kv = int(borders.diff().max())
        inherited = getattr(super(), "__post_init__", None)  # there from 0.17
        if inherited is not None:
            inherited()


@lru_cache(maxsize=64)
def _one_document(num_tokens: int, num_ranks: int) -> SequenceLayout:
    return SequenceLayout((num_tokens,), num_ranks, "zigzag")


def layout_of(
    packed_seq_params: PackedSeqParams | None, num_tokens: int, cp_size: int
) -> SequenceLayout:
    """The layout of a batch as Megatron hands it to a layer.

    Args:
        packed_seq_params: None for ``[s, b, h]`` batches: every row is one document in Megatron's
            zigzag order. A :class:`PackedSequence` has its layout. Megatron's own PackedSeqParams
            is accepted without context parallelism; if its lengths are on a GPU, every layer then
            waits for them.
        num_tokens: of this rank, after the sequence-parallel gather.
        cp_size: context-parallel ranks.

    Raises:
        ValueError: for per-document zigzag packs, which are no layout, and packs with a
            context-parallel group of their own.
    """
    if packed_seq_params is None:
        return _one_document(num_tokens * cp_size, cp_size)
    if packed_seq_params.local_cp_size is not None:
        raise ValueError(
            "packed_seq_params.local_cp_size must be None, got"
            f" {packed_seq_params.local_cp_size}: a pack has no group of its own here; cut all"
            " packs over the one context-parallel group"
        )
    layout = getattr(packed_seq_params, "layout", None)
    if layout is None and cp_size > 1:
        raise ValueError(
            "packed_seq_params must be a PackedSequence with context parallelism, got"
            f" {type(packed_seq_params).__name__}: Megatron's packs cut every document alone in"
            " zigzag order and pad it to a multiple of 2 cp; cut the whole pack with"
            " PackedSequence(layout=SequenceLayout(...)) and layout.shard instead"
        )
    if layout is None:
        padded = packed_seq_params.cu_seqlens_q_padded
        return SequenceLayout.from_cu_seqlens(
            packed_seq_params.cu_seqlens_q if padded is None else padded, 1
        )
    if layout.num_ranks != cp_size:
        raise ValueError(
            f"layout must be for the {cp_size} context-parallel ranks, got {layout.num_ranks}:"
            " build it with num_ranks of the context-parallel group"
        )
    checked: SequenceLayout = layout
    return checked
