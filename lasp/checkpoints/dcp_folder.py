"""Folders of ``torch.distributed.checkpoint``, which Megatron's dist checkpoints are too.

torch's own reader and writer do the work; its planners here ask for, and hand out, one expert or
one tensor at a time.
"""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from lasp.checkpoints.mapping import PIECE_BYTES, MappedTensor
from lasp.checkpoints.safe_reader import METADATA, CheckpointReader
from lasp.checkpoints.safetensors_folder import StoredTensor

# Makes a tensor, or rows of one; and objects beside the tensors, pickled, by name.
Make = Callable[[MappedTensor, slice | None], Tensor]
Extra = Mapping[str, bytes]
# Parts of expert stacks that are kept after reading: writers save several experts in one part.
KEPT_PARTS = 2


class DcpFolder:
    """Reads tensors of a checkpoint, whatever ranks saved it.

    Args:
        folder: has ``.metadata`` and the files it names.
        prefix: of names, which is left out (``model.``); names without it are kept.

    Raises:
        ValueError: for a file that is missing or cut short.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix
        self._parts: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()

    @cached_property
    def _opened(self) -> tuple[CheckpointReader, Metadata]:
        reader = CheckpointReader(self.folder)
        metadata = reader.read_metadata()
        sizes: dict[str, int] = {}
        for stored in metadata.storage_data.values():
            end = stored.offset + stored.length
            sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
        for file, size in sizes.items():
            path = self.folder / file
            held = path.stat().st_size if path.exists() else 0
            if held < size:
                raise ValueError(
                    f"{file} must have {size} bytes as {METADATA} says, got {held}: the checkpoint"
                    " was not finished or not copied whole"
                )
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        return reader, metadata

    @cached_property
    def _stored(self) -> dict[str, tuple[str, TensorStorageMetadata]]:
        """Name in the checkpoint and what it says of each tensor, by name without the prefix."""
        _, metadata = self._opened
        return {
            name.removeprefix(self.prefix): (name, stored)
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What the checkpoint says, by name without the prefix."""
        return {
            name: StoredTensor(tuple(stored.size), stored.properties.dtype, METADATA)
            for name, (_, stored) in self._stored.items()
        }

    @property
    def largest_chunk_bytes(self) -> int:
        """Bytes of the largest piece that a rank saved, which is read as one."""
        return max(
            torch.Size(chunk.sizes).numel() * stored.properties.dtype.itemsize
            for _, stored in self._stored.values()
            for chunk in stored.chunks
        )

    def read(self, name: str, expert: int | None, cut: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or an expert of one; or a slice of that."""
        _, stored = self._stored[name]
        if expert is None and cut is not None:
            low, high, _ = cut[0].indices(stored.size[0])
            return self._box(name, low, high)[:, *cut[1:]]
        if expert is None:
            tensor = self._box(name, 0, stored.size[0])
        else:
            ranges = [(c.offsets[0], c.offsets[0] + c.sizes[0]) for c in stored.chunks]
            mine = [(low, high) for low, high in ranges if low <= expert < high]
            low, high = max(low for low, _ in mine), min(high for _, high in mine)
            if (part := self._parts.pop((name, low, high), None)) is None:
                part = self._box(name, low, high)
            self._parts[name, low, high] = part
            while len(self._parts) > KEPT_PARTS:
                self._parts.popitem(last=False)
            tensor = part[expert - low]
        return tensor if cut is None else tensor[cut]

    def _box(self, name: str, low: int, high: int) -> Tensor:
        """Rows ``low`` to ``high`` of the first dim."""
        (reader, _), (whole, stored) = self._opened, self._stored[name]
        sizes = torch.Size((high - low, *stored.size[1:]))
        offsets = torch.Size((low, *[0] * (len(sizes) - 1)))
        box = ChunkStorageMetadata(offsets, sizes)
        items = create_read_items_for_chunk_list(whole, stored, [box])
        tensor = torch.empty(sizes, dtype=stored.properties.dtype)
        reader.read_data(LoadPlan(items), _IntoBox(tensor)).wait()
        return tensor


class _IntoBox(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, box: Tensor) -> None:
        super().__init__()
        self.box = box

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = zip(read_item.dest_offsets, read_item.lengths)
        return self.box[tuple(slice(start, start + length) for start, length in place)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class _InFiles(FileSystemWriter):
    """Writes several files: torch's writer keeps the last piece of every tensor of one."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        written: list[WriteResult] = []
        for number, items in enumerate(_by_file(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            written += super().write_data(part, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(written)
        return future


def _by_file(items: Iterable[WriteItem]) -> Iterator[list[WriteItem]]:
    """Whole tensors, of which one piece each takes at most ``PIECE_BYTES`` together."""
    file: list[WriteItem] = []
    kept = 0
    for _, group in groupby(items, key=lambda item: item.index.fqn):
        tensor = list(group)
        data = tensor[0].tensor_data
        size = 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
        if file and kept + size > PIECE_BYTES:
            yield file
            file, kept = [], 0
        file += tensor
        kept += size
    yield file


class _Piece(NamedTuple):
    """Rows of a tensor that are made and written at once; None: all."""

    tensor: MappedTensor
    dtype: torch.dtype
    rows: slice | None

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its place in the whole tensor."""
        sizes = list(self.tensor.part)
        first = self.tensor.expert or 0
        if self.tensor.expert is not None:
            sizes.insert(0, 1)
        if self.rows is not None:
            first, sizes[0] = self.rows.start, self.rows.stop - self.rows.start
        return ChunkStorageMetadata(torch.Size([first, *[0] * (len(sizes) - 1)]), torch.Size(sizes))


class _OneByOne(DefaultSavePlanner):
    """Makes each piece when it is written."""

    def __init__(self, pieces: Mapping[MetadataIndex, _Piece], make: Make, extra: Extra) -> None:
        super().__init__(flatten_state_dict=False)
        self.pieces, self.make, self.extra = pieces, make, extra

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self.extra]
        for index, piece in self.pieces.items():
            data = TensorWriteData(
                chunk=piece.chunk,
                properties=TensorProperties(dtype=piece.dtype),
                size=torch.Size(piece.tensor.shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self.extra[write_item.index.fqn])
        index = write_item.index
        piece = self.pieces[MetadataIndex(index.fqn, index.offset)]
        # torch's writer copies what is a view of more.
        made = self.make(piece.tensor, piece.rows).contiguous()
        return made if piece.tensor.expert is None else made.unsqueeze(0)


def write_dcp(
    folder: Path,
    tensors: Iterable[tuple[MappedTensor, torch.dtype]],
    make: Make,
    *,
    prefix: str = "",
    extra: Extra,
) -> None:
    """Write a checkpoint, a tensor, an expert or rows of a large tensor in memory at a time.

    Args:
        folder: where.
        tensors: what to write, and its dtype.
        make: makes rows of one of them.
        prefix: of names.
        extra: objects besides, pickled, by name.
    """
    pieces = {}
    for tensor, dtype in tensors:
        for rows in tensor.row_pieces(dtype):
            piece = _Piece(tensor, dtype, rows)
            pieces[MetadataIndex(prefix + tensor.name, piece.chunk.offsets)] = piece
    planner = _OneByOne(pieces, make, extra)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save({}, storage_writer=_InFiles(folder), planner=planner, no_dist=True)
