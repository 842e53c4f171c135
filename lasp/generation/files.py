"""Caches on disk: a file a rank, with the shape that must be that of the cache it is read into."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.generation.slots import SlotTable

# Keys that each rank holds, stops and ranks of stretches, and the tensors of each layer.
SavedSlot = tuple[list[int], list[int], list[int], list[list[Tensor]]]


class CacheShape(NamedTuple):
    """What decides whether a cache fits a model and its ranks.

    Attributes:
        layers: for each layer the shape of a slot's state, ``("state", H, K, V)``, or of a token's
            keys and values, ``("keys", Hkv, D, V)``, or of its latent, ``("latent", 1, R + P, R)``.
        dtype: of the model's parameters, and of keys.
        num_ranks: P, over which keys are spread.
    """

    layers: tuple[tuple[Any, ...], ...]
    dtype: torch.dtype
    num_ranks: int


def save(path: Path, shape: CacheShape, slots: dict[int, SavedSlot]) -> None:
    """Write a file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"shape": tuple(shape), "slots": slots}, path)


def load(
    path: Path,
    shape: CacheShape,
    table: SlotTable,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> dict[int, SavedSlot]:
    """The slots of a file; ValueError on every rank if that of any rank does not fit."""
    error, found = "", {}
    try:
        found = _checked(path, shape, table, device)
    except ValueError as refused:  # told to the others, who would go on without this rank
        error = str(refused)
    errors = [error]
    if group is not None:
        errors = [""] * group.size()
        dist.all_gather_object(errors, error, group)
    if told := next(filter(None, errors), ""):
        raise ValueError(told)
    return found


def _checked(
    path: Path, shape: CacheShape, table: SlotTable, device: torch.device
) -> dict[int, SavedSlot]:
    if used := table.used():
        raise ValueError(f"all slots must be free to load, got {used} in use: free them first")
    if not path.exists():
        raise ValueError(
            f"folder must hold {path.name}, saved by as many ranks, got none in {path.parent}"
        )
    found: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    for name, ours, theirs in zip(CacheShape._fields, shape, found["shape"]):
        if ours != theirs:
            raise ValueError(
                f"{name} of a saved cache must be those of the model, {ours}, got {theirs}"
            )
    slots: dict[int, SavedSlot] = found["slots"]
    most = max((max(held) for held, *_ in slots.values()), default=0)
    longest = max((stops[-1] for _, stops, *_ in slots.values() if stops), default=0)
    if (
        max(slots, default=0) >= len(table)
        or most > table.rank_tokens
        or longest > table.max_tokens
    ):
        raise ValueError(
            f"num_slots and max_tokens must be at least those that were saved, got {len(table)} and"
            f" {table.max_tokens}: make a larger cache"
        )
    return slots
