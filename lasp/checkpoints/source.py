"""A checkpoint in any format, opened and checked: its atoms, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lasp.checkpoints.atoms import VOCABULARY_ROLES, Atom, Shape, atoms_of
from lasp.checkpoints.configs import format_of
from lasp.checkpoints.dcp_folder import DcpFolder
from lasp.checkpoints.families import MEGATRON_GPT, MEGATRON_HYBRID, PLAIN
from lasp.checkpoints.family import Family
from lasp.checkpoints.mapping import MappedTensor, mapped
from lasp.checkpoints.megatron_extra import newest
from lasp.checkpoints.safe_reader import METADATA
from lasp.checkpoints.safetensors_folder import (
    INDEX,
    SINGLE,
    SafetensorsFolder,
    StoredTensor,
    read_json,
)
from lasp.hybrid.config import HybridConfig

CONFIG = "config.json"
# transformers' class for images and text keeps the language model under this name.
_TEXT_PREFIX = "language_model."
# Names shown of a list that may have thousands.
_SHOWN = 3


class Storage(Protocol):
    """Files of tensors."""

    folder: Path

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """What is there, by name."""

    def read(self, name: str, expert: int | None, cut: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or what one expert has of it; or a slice of that."""


class Source:
    """A checkpoint and the model that it is of.

    Args:
        folder: that was opened, which has the small files.
        storage: its tensors.
        family: their names.
        config: the model.
        fields: of its config.json.

    Raises:
        ValueError: for tensors that the model does not have, has and are missing, or that are of
            another shape; no tensor is read before.
    """

    def __init__(
        self,
        folder: Path,
        storage: Storage,
        family: Family,
        config: HybridConfig,
        fields: dict[str, Any],
    ) -> None:
        self.folder, self.storage, self.family = folder, storage, family
        self.config, self.fields = config, fields
        self.shapes = atoms_of(config)
        self._tensors = mapped(family, config)
        self._holder = {atom: tensor for tensor in self._tensors for atom in tensor.atoms}
        self._last: tuple[MappedTensor, dict[Atom, Tensor]] | None = None
        self._check()

    def _check(self) -> None:
        there = self.storage.tensors
        wanted = {tensor.name: tensor for tensor in self._tensors}
        others = [n for n in there if n not in wanted and not self.family.skips(n)]
        self._refuse(others, "must hold the model of its config.json, got besides")
        self._refuse([n for n in wanted if n not in there], "must hold all of the model, missing")
        for name, tensor in wanted.items():
            if not self._fits(tensor, there[name].shape):
                raise ValueError(
                    f"{name} must have shape {tensor.shape} by config.json, got"
                    f" {there[name].shape} in {there[name].shard}: is it the config of these"
                    " weights?"
                )

    def _refuse(self, names: Sequence[str], what: str) -> None:
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ValueError(f"{self.storage.folder} {what} {len(names)} tensors: {shown}")

    def _fits(self, tensor: MappedTensor, shape: Shape) -> bool:
        """Whether a shape is right; trainers may have padded the vocabulary."""
        if shape == tensor.shape:
            return True
        padded = self.is_trained and tensor.atoms[0].role in VOCABULARY_ROLES
        return padded and shape[1:] == tensor.shape[1:] and shape[0] >= tensor.shape[0]

    @property
    def is_trained(self) -> bool:
        """Whether a trainer's checkpoint, and no released files."""
        return isinstance(self.storage, DcpFolder)

    def dtype(self, atom: Atom) -> torch.dtype:
        """In which an atom is stored."""
        return self.storage.tensors[self._holder[atom].name].dtype

    def holders(self, tensor: MappedTensor) -> list[MappedTensor]:
        """The tensors of the source that hold the atoms of one of another format."""
        return list(dict.fromkeys(self._holder[atom] for atom in tensor.atoms))

    def atom(self, atom: Atom, cut: tuple[slice, ...] | None = None) -> Tensor:
        """An atom, or a slice of it.

        Atoms that are joined in one tensor are read together and kept until another is asked for.
        """
        holder = self._holder[atom]
        if cut is not None and len(holder.atoms) == 1:
            return self.storage.read(holder.name, holder.expert, cut)
        if self._last is None or self._last[0] is not holder:
            self._last = None
            part = self.storage.read(holder.name, holder.expert)
            if holder.expert is None and part.shape != holder.shape:
                part = part[: holder.shape[0]]  # the rest is padding of the vocabulary
            self._last = holder, holder.split(part, self.shapes)
        tensor = self._last[1][atom]
        return tensor if cut is None else tensor[cut]


def open_source(folder: str | Path, config_path: Path | None = None) -> Source:
    """Open a checkpoint, whatever its format.

    Args:
        folder: released files (safetensors and config.json), or a checkpoint of
            ``torch.distributed.checkpoint`` or of Megatron, also the folder of all steps of a run.
        config_path: the config.json; None: that of the folder.

    Raises:
        ValueError: as of :class:`Source`, and if the folder is none of these.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"the folder to read must be there, got {folder}")
    inside = newest(folder)
    files = [name for name in (INDEX, SINGLE) if (folder / name).exists()]
    is_dcp = (inside / METADATA).exists()
    if files and is_dcp:
        raise ValueError(f"{folder} must hold one checkpoint, got {files[0]} and {METADATA}")
    fields = read_json(config_path or folder / CONFIG)
    file_format = format_of(fields)
    config = file_format.read(fields)
    if not is_dcp:
        prefix = _TEXT_PREFIX if "text_config" in fields else ""
        storage = SafetensorsFolder(folder, prefix)
        return Source(folder, storage, file_format.family, config, fields)
    dcp = DcpFolder(inside, "model.")
    family = PLAIN
    if any(name.startswith("decoder.layers.") for name in dcp.tensors):
        final = "decoder.final_norm.weight"
        family = MEGATRON_HYBRID if final in dcp.tensors else MEGATRON_GPT
    return Source(folder, dcp, family, config, fields)


def read_config(folder: str | Path) -> HybridConfig:
    """The model of a folder's config.json.

    Raises:
        ValueError: for a config of another model, without a field, or with one that the model does
            not have.
    """
    fields = read_json(Path(folder) / CONFIG)
    return format_of(fields).read(fields)
