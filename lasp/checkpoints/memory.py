"""The most memory that a conversion takes beside what Python and torch do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lasp.checkpoints.dcp_folder import KEPT_PARTS, DcpFolder
from lasp.checkpoints.mapping import PIECE_BYTES, MappedTensor
from lasp.checkpoints.source import Source

_Typed = tuple[MappedTensor, torch.dtype]


def into_checkpoint(source: Source, tensors: Sequence[_Typed]) -> int:
    """A piece, what is read for it, the copy of a view, and pieces of other tensors of the file.

    The last two are torch's writer's.
    """
    pieces = [_piece(*typed) for typed in tensors]
    largest = max(_read(source, *typed, piece) + 2 * piece for typed, piece in zip(tensors, pieces))
    return largest + max(min(PIECE_BYTES, sum(pieces)), max(pieces))


def into_files(source: Source, tensors: Sequence[_Typed], shard_bytes: int) -> int:
    """A shard, and what a tensor takes before it is there."""
    sizes = [tensor.num_bytes(dtype) for tensor, dtype in tensors]
    shard = max(min(shard_bytes, sum(sizes)), max(sizes))
    return shard + max(
        0 if _is_mapped(source, *typed) else _read(source, *typed, size) + size
        for typed, size in zip(tensors, sizes)
    )


def _piece(tensor: MappedTensor, dtype: torch.dtype) -> int:
    """Bytes of the largest piece that is written at once."""
    rows = tensor.row_pieces(dtype)[0]
    size = tensor.num_bytes(dtype)
    return size if rows is None else size * (rows.stop - rows.start) // tensor.part[0]


def _is_mapped(source: Source, tensor: MappedTensor, dtype: torch.dtype) -> bool:
    """Whether a tensor of a shard is one of the source's files, as the system maps them."""
    (first, *others) = source.holders(tensor)
    same = not others and len(first.atoms) == 1 and dtype == source.dtype(first.atoms[0])
    return same and not source.is_trained


def _read(source: Source, tensor: MappedTensor, dtype: torch.dtype, size: int) -> int:
    """Bytes that are read for ``size`` bytes of a tensor."""
    held = sum(
        min(holder.num_bytes(source.dtype(holder.atoms[0])), size)
        if len(holder.atoms) == 1
        else holder.num_bytes(source.dtype(holder.atoms[0]))
        for holder in source.holders(tensor)
    )
    if isinstance(source.storage, DcpFolder):
        # Parts that are kept, and one as torch reads it.
        held += (KEPT_PARTS + 1) * source.storage.largest_chunk_bytes
    return held
