"""Layouts of the packs that Megatron's own loaders make."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from lasp.megatron.checks import training_argument
from lasp.sequence.layout import Order, SequenceLayout

PackedCut = Literal["document_zigzag", "row_zigzag"]
"""How a loader cuts packs over context-parallel ranks, which PackedSeqParams does not say.

``document_zigzag``: zigzag in every document, each padded to a multiple of 2 cp, as Megatron's SFT
loader, Megatron-Bridge and TransformerEngine do. ``row_zigzag``: zigzag over the whole row, with
documents of any length, as ``--dataloader-inter-document-masking`` of Megatron 0.19 does.
"""

_ORDERS: dict[PackedCut, Order] = {"document_zigzag": "document_zigzag", "row_zigzag": "zigzag"}
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_q_padded", "cu_seqlens_kv", "cu_seqlens_kv_padded")


def check_packed_cut(packed_cut: PackedCut | None) -> None:
    """Raise ValueError for what is no :data:`PackedCut` and not None."""
    if packed_cut not in (None, *get_args(PackedCut)):
        raise ValueError(
            f"packed_cut must be None or one of {get_args(PackedCut)}, got {packed_cut!r}: name the"
            " cut of the loader"
        )


def cut_of_training_loop() -> PackedCut | None:
    """The cut of the loader of Megatron's training loop, by its arguments; None without one."""
    if training_argument("sft"):
        return "document_zigzag"
    return "row_zigzag" if training_argument("dataloader_inter_document_masking") else None


class _Made(NamedTuple):
    """A layout, and what it was made of; the tensors keep their identities."""

    cut: tuple[int, PackedCut | None]
    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    layout: SequenceLayout


def layout_of_megatrons_pack(
    packed_seq_params: PackedSeqParams, cp_size: int, packed_cut: PackedCut | None
) -> SequenceLayout:
    """The layout of a PackedSeqParams that has none; kept on it while its lengths stay.

    Args and errors: see :func:`lasp.megatron.layout_of`.
    """
    tensors = tuple(getattr(packed_seq_params, name) for name in _LENGTHS)
    versions = tuple(0 if x is None or x.is_inference() else x._version for x in tensors)
    made: _Made | None = vars(packed_seq_params).get("_made_layout")
    if (
        made is not None
        and made.cut == (cp_size, packed_cut)
        and made.versions == versions
        and all(a is b for a, b in zip(made.tensors, tensors))
    ):
        return made.layout
    if cp_size > 1 and packed_cut is None:
        raise ValueError(
            "packed_seq_params must be a PackedSequence with context parallelism, or packed_cut"
            f" named, got {type(packed_seq_params).__name__} and None: it does not say whether its"
            " loader cut every document or the whole row in zigzag order; give the spec"
            " packed_cut='document_zigzag' or 'row_zigzag'"
        )
    if tensors[0] is None or any(x is not None and x.dim() != 1 for x in tensors):
        shapes = [None if x is None else list(x.shape) for x in tensors]
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q must be [documents + 1], as the other lengths, got"
            f" {shapes}: squeeze the dim of the batch"
        )
    lengths, padded, *of_keys = ([] if x is None else x.tolist() for x in tensors)
    if any(keys not in ([], own) for keys, own in zip(of_keys, (lengths, padded))):
        raise ValueError(
            "packed_seq_params.cu_seqlens_kv must be cu_seqlens_q, padded or not, got other"
            " lengths: keys and queries are of the same documents in self-attention"
        )
    order = "contiguous" if packed_cut is None else _ORDERS[packed_cut]
    # Every document_zigzag pack is padded, by nothing where no lengths say more.
    padded = padded or (lengths if order == "document_zigzag" else None)
    layout = SequenceLayout.from_cu_seqlens(lengths, cp_size, order, padded)
    vars(packed_seq_params)["_made_layout"] = _Made(
        (cp_size, packed_cut), tensors, versions, layout
    )
    return layout


def names_padding(packed_seq_params: Any) -> bool:
    """Whether a PackedSeqParams tells its padding from its documents; the same on every rank.

    Megatron's own training loop gives the padded lengths as both.
    """
    padded = packed_seq_params.cu_seqlens_q_padded
    return padded is not None and padded is not packed_seq_params.cu_seqlens_q


def check_rolled(layout: SequenceLayout, packed: bool) -> None:
    """Raise ValueError unless Megatron's multi-token prediction rolls tokens and labels right.

    It rolls by a cut that it takes for granted: rows as zigzag, packs as zigzag in every document,
    without padding.
    """
    padded = layout.padded_lengths not in (None, layout.document_lengths)
    wanted = "document_zigzag" if packed else "zigzag"
    if padded or (layout.num_ranks > 1 and layout.order != wanted):
        raise ValueError(
            f"layout must be {wanted} over context-parallel ranks, of documents without padding,"
            f" with config.mtp_num_layers, got {layout.order} over {layout.num_ranks}"
            f" {'with' if padded else 'without'} padding: Megatron's multi-token prediction rolls"
            " tokens and labels so; lengths must divide by twice the ranks"
        )
