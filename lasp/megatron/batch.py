"""Batches as Megatron hands them to a layer, and the layout of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp._core.checks import check_part
from lasp.hybrid.packing import PackedBatch
from lasp.megatron.checks import training_argument
from lasp.megatron.packs import PackedCut, layout_of_megatrons_pack
from lasp.sequence.layout import Order, SequenceLayout, one_document


@dataclass
class PackedSequence(PackedSeqParams):
    """A packed batch cut over the context-parallel ranks in any order of the layout.

    It is a PackedSeqParams, so Megatron hands it through layers, recompute and pipeline stages;
    our modules read the layout. Tokens on a rank are ``layout.shard(pack, cp_rank)``, ``[T, 1, h]``
    (with sequence parallelism T / tp of them). Build it once per micro-batch from host data:
    ``PackedSequence.of(pack_batch(...))``, see :func:`lasp.hybrid.pack_batch`.

    Attributes:
        layout: which tokens each context-parallel rank holds; required.
        token_order: a ``moe_parallel.TokenOrder`` over the ranks of all tensor, context and data
            parallel ranks, for capacity by position and for the auxiliary loss without padding.

    The fields of PackedSeqParams are filled from the layout, cumulative lengths on the CPU: of
    documents and paddings in turn, or, in the order ``document_zigzag``, of documents, and padded.
    """

    # Required; a field after others with defaults must have one.
    layout: SequenceLayout = None  # type: ignore[assignment]
    token_order: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.layout, SequenceLayout):
            raise ValueError(
                f"layout must be a SequenceLayout, got {self.layout!r}: build one from the"
                " document lengths and the size of the context-parallel group"
            )
        borders = torch.tensor(self.layout.borders, dtype=torch.int32)
        if self.layout.order == "document_zigzag":  # as Megatron's RoPE for packs reads it
            lengths = torch.tensor((self.layout.document_lengths, self.layout.padded_lengths))
            real, borders = F.pad(lengths.cumsum(1), (1, 0)).int()
            self.cu_seqlens_q_padded = self.cu_seqlens_kv_padded = borders
            self.cu_seqlens_q = self.cu_seqlens_kv = real
        else:
            self.cu_seqlens_q = self.cu_seqlens_kv = borders
        self.qkv_format = "thd"
        self.max_seqlen_q = self.max_seqlen_kv = int(borders.diff().max())
        inherited = getattr(super(), "__post_init__", None)  # there from 0.17
        if inherited is not None:
            inherited()

    @classmethod
    def of(cls, batch: PackedBatch) -> PackedSequence:
        """The batch as Megatron hands it on."""
        check_part("batch", batch, PackedBatch)
        return cls(layout=batch.layout, token_order=batch.token_order)


# What Megatron's loaders put beside the tokens: lengths and sizes of the whole pack.
_WITHOUT_TOKENS = frozenset(
    (
        "cu_seqlens",
        "cu_seqlens_argmin",
        "cu_seqlens_padded",
        "dataset_id",
        "local_cp_size",
        "max_seqlen",
    )
)


def shard_batch(
    batch: Mapping[str, Any], packed: PackedSequence, *, cp_rank: int
) -> dict[str, Any]:
    """The part of a pack that a context-parallel rank holds: get_batch_on_this_cp_rank of a layout.

    Megatron's function of that name cuts rows in its zigzag order, and packs with a kernel of
    TransformerEngine that needs every document padded to a multiple of 2 cp. Here the layout says
    who holds what, and where zeros are put into a pack that comes without padding: its
    ``loss_mask`` too.

    Args:
        batch: by name, as Megatron's ``get_batch`` has it: ``tokens``, ``labels``, ``loss_mask``
            and any other ``[1, S, ...]`` of the whole pack, with or without the padding. What holds
            no tokens is passed on: numbers, tensors of one element, Megatron's lengths and sizes by
            name. So is None, of what a pipeline stage does not need.
        packed: of the batch.
        cp_rank: rank within the context-parallel group.

    Returns:
        The same names, ``[1, T, ...]`` each, and as ``position_ids`` those within the documents,
        int64 ``[1, T]``, whatever came; none if the batch has no tokens.

    Raises:
        ValueError: for an attention mask, labels that would be padded without a loss mask, and
            tensors that are not of this pack.
    """
    check_part("batch", batch, Mapping)
    check_part("packed", packed, PackedSequence)
    layout, cut = packed.layout, dict(batch)
    num_tokens = layout.num_real_tokens
    if batch.get("attention_mask") is not None:
        raise ValueError(
            "attention_mask must be None, got a tensor: the documents of the pack are the mask;"
            " give none (in Megatron's training --no-create-attention-mask-in-dataloader)"
        )
    labels, loss_mask = batch.get("labels"), batch.get("loss_mask")
    if labels is not None and loss_mask is None and num_tokens < layout.num_tokens:
        raise ValueError(
            f"loss_mask must come with labels whose {num_tokens} tokens are padded to"
            f" {layout.num_tokens}, got None: give ones, the padding gets zeros"
        )
    of_tokens = {
        name: values
        for name, values in batch.items()
        if isinstance(values, Tensor)
        and name not in _WITHOUT_TOKENS
        and (values.dim() > 1 or values.numel() != 1)
    }
    for name, values in of_tokens.items():
        if name == "position_ids":
            continue
        if values.shape[:2] not in ((1, num_tokens), (1, layout.num_tokens)):
            raise ValueError(
                f"{name} must be [1, {num_tokens}, ...], or [1, {layout.num_tokens}, ...] with"
                f" padding, got {list(values.shape)}: is this the PackedSequence of this batch?"
            )
        cut[name] = layout.shard(values, cp_rank, dim=1)
    if device := next((values.device for values in of_tokens.values()), None):
        cut["position_ids"] = layout.position_ids(cp_rank, device).unsqueeze(0)
    return cut


def order_of_rows(config: TransformerConfig, part: str) -> Order:
    """In which order the context-parallel ranks hold Megatron's ``[s, b, h]`` rows.

    Zigzag, if the config says no other: ``linear_cp_layout`` and ``attention_cp_layout`` of
    Megatron's main, ``cp_partition_mode`` of its dev branch.

    Raises:
        ValueError: for layers of different orders, for orders that are not known, and where the
            training loop asks for a mask of the documents in a row, which no layer reads.
    """
    if training_argument("reset_attention_mask"):
        raise ValueError(
            f"Megatron's training argument reset_attention_mask must be False for {part}, got True:"
            " a row is one document, whatever attention_mask says; for documents of their own take"
            " packs, as of --dataloader-inter-document-masking or --sft"
        )
    names = ("linear_cp_layout", "attention_cp_layout", "cp_partition_mode")
    stated = {name: getattr(config, name) for name in names if hasattr(config, name)}
    orders: tuple[Order, ...] = ("zigzag", "contiguous")
    for order in orders:
        if all(value == order for value in stated.values()):
            return order
    said = ", ".join(f"config.{name} {value!r}" for name, value in stated.items())
    raise ValueError(
        f"{' and '.join(f'config.{name}' for name in stated)} must be one of {orders}, the same for"
        f" all layers, for {part}, got {said}: our layers take rows in any one order, and never"
        " change it"
    )


def layout_of(
    packed_seq_params: PackedSeqParams | None,
    num_tokens: int,
    cp_size: int,
    order: Order = "zigzag",
    packed_cut: PackedCut | None = None,
) -> SequenceLayout:
    """The layout of a batch as Megatron hands it to a layer.

    Args:
        packed_seq_params: None for ``[s, b, h]`` batches: every row is one document, cut in
            ``order``. A :class:`PackedSequence` has its layout. That of Megatron's own
            PackedSeqParams is made of its lengths, once for all layers; lengths on a GPU are waited
            for. Padding after documents (``cu_seqlens_q_padded``) is of no document.
        num_tokens: of this rank, after the sequence-parallel gather.
        cp_size: context-parallel ranks.
        order: of rows, see :func:`order_of_rows`.
        packed_cut: how Megatron's own packs were cut over several ranks, see :data:`PackedCut`.

    Raises:
        ValueError: for other formats than thd, packs over several ranks whose cut is not named,
            packs of other lengths than the tokens, and packs with a context-parallel group of their
            own.
    """
    if packed_seq_params is None:
        return one_document(num_tokens * cp_size, cp_size, order)
    if packed_seq_params.local_cp_size is not None:
        raise ValueError(
            "packed_seq_params.local_cp_size must be None, got"
            f" {packed_seq_params.local_cp_size}: a pack has no group of its own here; cut all"
            " packs over the one context-parallel group"
        )
    if packed_seq_params.qkv_format != "thd":
        raise ValueError(
            f"packed_seq_params.qkv_format must be 'thd', got {packed_seq_params.qkv_format!r}:"
            " pass rows [s, b, h] without packed_seq_params"
        )
    layout: SequenceLayout | None = getattr(packed_seq_params, "layout", None)
    if layout is None:
        layout = layout_of_megatrons_pack(packed_seq_params, cp_size, packed_cut)
    if layout.num_ranks != cp_size:
        raise ValueError(
            f"layout must be for the {cp_size} context-parallel ranks, got {layout.num_ranks}:"
            " build it with num_ranks of the context-parallel group"
        )
    if layout.num_local_tokens != num_tokens:
        raise ValueError(
            f"packed_seq_params must be of {num_tokens} tokens a rank, as the hidden states, got"
            f" {layout.num_local_tokens}: is this the pack of this batch, and cut as packed_cut"
            " says?"
        )
    return layout
