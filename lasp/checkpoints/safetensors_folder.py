"""Folders of safetensors shards with an index, read tensor by tensor and written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lasp.checkpoints.atoms import Shape
from lasp.checkpoints.safe_reader import check_plain_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class StoredTensor(NamedTuple):
    """What a header says of a tensor."""

    shape: Shape
    dtype: torch.dtype
    shard: str


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file.

    Raises:
        ValueError: if there is none.
    """
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} must have a {path.name}, got none there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got text that ends or breaks: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(fields).__name__}")
    return fields


class SafetensorsFolder:
    """Reads shards by their index; what a shard holds is checked when its headers are read.

    A tensor is read from a file that is opened for it alone, so that nothing else of its shard
    stays in memory.

    Args:
        folder: has an index and its shards, or one file ``model.safetensors``.
        prefix: of names, which is left out (``language_model.``); names without it are kept.

    Raises:
        ValueError: for a file that is missing, cut short or no safetensors file, and for names
            that are twice there or where the index does not say.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """What the headers say, by name without the prefix."""
        found: dict[str, StoredTensor] = {}
        weight_map = self._weight_map()
        for shard in sorted(set(weight_map.values())) if weight_map else [SINGLE]:
            for name, stored in self._header(shard).items():
                if name in found:
                    raise ValueError(
                        f"{name} must be in one shard, got it in {found[name].shard} and {shard}:"
                        " download one of them again"
                    )
                if weight_map and weight_map.get(name) != shard:
                    raise ValueError(
                        f"{shard} must hold what {INDEX} says, got {name} besides, which the index"
                        f" has in {weight_map.get(name, 'no shard')}"
                    )
                found[name] = stored
        missing = sorted(set(weight_map) - set(found))
        if missing:
            raise ValueError(
                f"{weight_map[missing[0]]} must hold {missing[0]} as {INDEX} says, got a file"
                f" without it ({len(missing)} such tensors): download it again"
            )
        self._whole_names = {name.removeprefix(self.prefix): name for name in found}
        return {name.removeprefix(self.prefix): stored for name, stored in found.items()}

    def _weight_map(self) -> dict[str, str]:
        if not (self.folder / INDEX).exists():
            if (self.folder / SINGLE).exists():
                return {}
            raise ValueError(
                f"{self.folder} must have {INDEX} or {SINGLE}, got neither: is the download"
                " complete?"
            )
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{INDEX} must have a weight_map of names, got {weight_map!r}")
        for shard in weight_map.values():
            check_plain_name(shard, INDEX)
        return weight_map

    def _header(self, shard: str) -> dict[str, StoredTensor]:
        found = {}
        with self._opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(
                        f"{name} in {shard} must be of {sorted(_DTYPES)}, got {part.get_dtype()}:"
                        " quantised weights are not read"
                    )
                found[name] = StoredTensor(tuple(part.get_shape()), dtype, shard)
        return found

    def _opened(self, shard: str) -> Any:
        path = self.folder / shard
        if not path.exists():
            raise ValueError(
                f"{INDEX} must name shards that are there, got {shard}, which is not: download it"
            )
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(
                f"{shard} must be a whole safetensors file, got {path.stat().st_size} bytes that"
                f" are not ({error}): download it again"
            ) from None

    def read(self, name: str, expert: int | None, cut: tuple[slice, ...] | None = None) -> Tensor:
        """A tensor, or a slice of it: memory of its own, and only what was asked for."""
        assert expert is None
        stored = self.tensors[name]
        with self._opened(stored.shard) as file:
            whole = self._whole_names[name]
            tensor: Tensor
            tensor = file.get_tensor(whole) if cut is None else file.get_slice(whole)[cut]
        return tensor


class Shard(NamedTuple):
    """A file to write: its name, and the names of its tensors."""

    file: str
    names: tuple[str, ...]


def plan_shards(sizes: Iterable[Iterable[tuple[str, int]]], shard_bytes: int) -> list[list[Shard]]:
    """Deal tensors out to shards, in their order.

    Args:
        sizes: names and bytes of each writer's tensors.
        shard_bytes: of a shard at most; a larger tensor has one alone.

    Returns:
        The shards of each writer; their files are numbered over all writers.
    """
    dealt: list[list[list[str]]] = []
    for of_writer in sizes:
        shards: list[list[str]] = [[]]
        filled = 0
        for name, size in of_writer:
            if shards[-1] and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        dealt.append([shard for shard in shards if shard])
    count, number, planned = sum(map(len, dealt)), 0, []
    for shards in dealt:
        named = []
        for names in shards:
            number += 1
            named.append(Shard(f"model-{number:05}-of-{count:05}.safetensors", tuple(names)))
        planned.append(named)
    return planned


def write_shards(folder: Path, shards: Iterable[Shard], tensors: Iterator[Tensor]) -> None:
    """Write shards, one in memory at a time; ``tensors`` come in the order of their names."""
    for shard in shards:
        held = {name: next(tensors).contiguous() for name in shard.names}
        save_file(held, folder / shard.file, metadata={"format": "pt"})
        del held


def write_index(folder: Path, shards: Iterable[Shard], num_bytes: int) -> None:
    """Write the index of shards; of one shard too, which llama.cpp's converter needs."""
    weight_map = {name: shard.file for shard in shards for name in shard.names}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
