"""Folders of ``torch.distributed.checkpoint`` that others wrote, read without running their code.

torch unpickles ``.metadata`` and objects beside the tensors, and a pickle may call anything. Here
``.metadata`` may name torch's own records alone, and objects load with ``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

METADATA = ".metadata"
# Their dataclasses and enumerations hold numbers and names; Megatron keeps plans there too.
_RECORDS = {
    f"torch.distributed.checkpoint.{name}" for name in ("filesystem", "metadata", "planner")
}
_BESIDES = {("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


class CheckpointReader(FileSystemReader):
    """torch's reader of a folder, for ``dcp.load(..., storage_reader=CheckpointReader(folder))``.

    Raises:
        ValueError: in ``read_metadata``, if ``.metadata`` ends early, is damaged, names anything
            but torch's own records, or files outside the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the checkpoint holds and where."""
        path = PurePath(self.path) / METADATA
        try:
            with self.fs.create_stream(self.fs.init_path(path), "rb") as stream:
                metadata = _Records(stream).load()
        except (OSError, _UnsafeNameError):
            raise
        except Exception as error:  # other bytes in a pickle raise nearly any
            raise ValueError(
                f"{path} must be that of a finished checkpoint, got one that ends early or is"
                f" damaged ({type(error).__name__}: {error}): take another step of the run"
            ) from None
        if not isinstance(metadata, Metadata):
            raise ValueError(f"{path} must hold Metadata, got {type(metadata).__name__}")
        for stored in (metadata.storage_data or {}).values():
            check_plain_name(getattr(stored, "relative_path", ""), str(path))
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckpointPlanner(DefaultLoadPlanner):
    """torch's plan of a load, for ``dcp.load(..., planner=CheckpointPlanner())``.

    Raises:
        pickle.UnpicklingError: in ``load_bytes``, for an object that is no plain data.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object into the state, after it was seen to be plain data."""
        torch.load(value, weights_only=True)  # torch's planner does not ask for this
        value.seek(0)
        super().load_bytes(read_item, value)


class _UnsafeNameError(ValueError):
    """A name that could run code."""


class _Records(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in _RECORDS and "." not in name:
            found = super().find_class(module, name)
            if is_dataclass(found) or (isinstance(found, type) and issubclass(found, Enum)):
                return found
        if module == "torch" and "." not in name:
            found = getattr(torch, name, None)
            if found is torch.Size or isinstance(found, torch.dtype):
                return found
        is_path = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        if is_path or (module, name) in _BESIDES:
            return super().find_class(module, name)
        raise _UnsafeNameError(
            f"{METADATA} must name torch's records of tensors alone, got {module}.{name}, which"
            " could run code: do not load this checkpoint"
        )


def check_plain_name(name: str, where: str) -> None:
    """Raise ValueError unless a name that a file gives is that of a file or folder beside it."""
    if not isinstance(name, str) or name in ("", ".", "..") or PurePath(name).name != name:
        raise ValueError(
            f"{where} must name files of its own folder, got {name!r}: do not load this checkpoint"
        )
