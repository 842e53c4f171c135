"""Checks of arguments that several operators have."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from reprlib import repr as short_repr
from typing import Any, Protocol, SupportsIndex, TypeGuard, get_args

import torch.distributed as dist
from torch import Tensor


def checked_scale(scale: float) -> float:
    """The factor of an operator; ValueError unless it is finite."""
    try:
        if math.isfinite(scale):
            return float(scale)
    except TypeError:  # no number
        pass
    raise ValueError(f"scale must be finite, got {scale!r}: leave it out for the default")


def check_positive(**values: float | None) -> None:
    """Raise ValueError unless these are finite numbers above 0."""
    for name, value in values.items():
        if not (_is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a finite number > 0, got {value!r}")


def check_positive_or_none(**values: float | None) -> None:
    """The same, but for those that are None."""
    check_positive(**{name: value for name, value in values.items() if value is not None})


def check_not_negative(**values: float) -> None:
    """Raise ValueError unless these are finite numbers, 0 or above."""
    for name, value in values.items():
        if not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def check_finite(**values: float) -> None:
    """Raise ValueError unless these are finite numbers."""
    for name, value in values.items():
        if not (_is_number(value) and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_flags(**values: object) -> None:
    """Raise ValueError unless these are True or False: any text counts as true, ``"no"`` too."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}: pass a bool")


def check_sizes(least: int = 1, **values: int | None) -> None:
    """Raise ValueError unless these are integers of at least ``least``."""
    for name, value in values.items():
        try:
            valid = not isinstance(value, bool) and operator.index(value) >= least  # type: ignore[arg-type]
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_sizes_or_none(least: int = 1, **values: int | None) -> None:
    """The same, but for those that are None."""
    check_sizes(least, **{name: value for name, value in values.items() if value is not None})


def integers(name: str, values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """The argument ``name`` as ints; ValueError if it holds anything else."""
    try:
        return tuple(map(operator.index, values))
    except TypeError:
        raise ValueError(f"{name} must be integers, got {values!r}") from None


def check_one_of(kind: Any, **values: str) -> None:
    """Raise ValueError unless these are of ``kind``, a ``Literal``."""
    for name, value in values.items():
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}")


def check_part(name: str, value: object, kind: type, *, optional: bool = False) -> None:
    """Raise ValueError unless ``value``, the argument ``name``, is of ``kind``, or None.

    What ``torch.compile`` makes of a module is of the module's kind.
    """
    if isinstance(value, kind) or (optional and value is None):
        return
    if not isinstance(getattr(value, "_orig_mod", None), kind):
        wanted = f"of type {kind.__name__}{' or None' if optional else ''}"
        raise ValueError(f"{name} must be {wanted}, got {short_repr(value)}: pass one")


class Shards(Protocol):
    """How a layout cuts a pack: over how many ranks, and into how many tokens a rank."""

    @property
    def num_ranks(self) -> int: ...
    @property
    def num_local_tokens(self) -> int: ...


def checked_rank(
    name: str, x: Tensor, token_dim: int, layout: Shards, cp_group: dist.ProcessGroup | None
) -> int:
    """The rank within ``cp_group`` that holds the tokens of ``x``, the argument ``name``.

    Raises:
        ValueError: if the layout is for another number of ranks, or has other numbers of tokens.
    """
    num_ranks, num_tokens = 1 if cp_group is None else cp_group.size(), x.shape[token_dim]
    if layout.num_ranks != num_ranks:
        raise ValueError(
            f"layout must be for the {num_ranks} ranks of cp_group, got num_ranks"
            f" {layout.num_ranks}: build it with cp_group.size() and pass that group"
        )
    if layout.num_local_tokens != num_tokens:
        raise ValueError(
            f"layout must hold the {num_tokens} tokens a rank of {name} {tuple(x.shape)}, got"
            f" {layout.num_local_tokens}: is this the layout of this batch, and {name} sharded"
            " by it?"
        )
    return 0 if cp_group is None else cp_group.rank()
