"""What every Megatron part asks of its config and its process groups."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig


def require(config: TransformerConfig, part: str, **wanted: object) -> None:
    """Raise ValueError for the first option of ``config`` that is set and differs from ``wanted``.

    Options that this Megatron version does not have are not checked.
    """
    for name, value in wanted.items():
        actual = getattr(config, name, value)
        if actual != value and not (actual is None and not value):
            raise ValueError(
                f"config.{name} must be {value!r} for {part}, got {actual!r}: it is not supported"
            )


def groups_of(pg_collection: ProcessGroupCollection | None, part: str, *names: str) -> list[Any]:
    """Process groups by name; from Megatron's parallel state if no collection is given.

    Raises:
        ValueError: if a group is missing.
    """
    if pg_collection is None:
        if not parallel_state.model_parallel_is_initialized():
            raise ValueError(
                f"pg_collection must be given for {part}, got None: pass a ProcessGroupCollection"
                " or call parallel_state.initialize_model_parallel first"
            )
        pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=list(names))
    groups = [getattr(pg_collection, name, None) for name in names]
    missing = [name for name, group in zip(names, groups) if group is None]
    if missing:
        raise ValueError(f"pg_collection must have {missing} for {part}: set these groups")
    return groups


def parameter_device(config: TransformerConfig) -> torch.device:
    """Where Megatron puts a module's parameters."""
    if config.use_cpu_initialization:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
