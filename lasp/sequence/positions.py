"""Positions of tokens within their documents, as the operator ``torch.ops.lasp.positions``.

Documents are data to it, so that a compiled graph is good for every pack.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.checks import checked_rank
from lasp._core.operators import Operators
from lasp.sequence.layout import Order, SequenceLayout


def positions(
    name: str,
    x: Tensor,
    token_dim: int,
    layout: SequenceLayout | None,
    cp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Position of each token of ``x`` within its document: int64 ``[T]`` on the device of ``x``.

    Args:
        name: of ``x`` in errors.
        x: this rank's tokens.
        token_dim: the dim of ``x`` that has T tokens.
        layout: who holds which tokens; None: one document on one rank.
        cp_group: the ranks of the layout.

    Raises:
        ValueError: if the layout is of another length or of another number of ranks.
    """
    if layout is None:
        return torch.arange(x.shape[token_dim], device=x.device)
    group = "" if cp_group is None else cp_group.group_name
    where = layout._lengths, layout.num_ranks, layout.order, group
    found: Tensor = _call_positions(x, name, token_dim, *where)
    return found


def _positions(
    x: Tensor, name: str, token_dim: int, lengths: Tensor, num_ranks: int, order: Order, group: str
) -> Tensor:
    layout = SequenceLayout.from_lengths_tensor(lengths, num_ranks, order)
    cp_group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
    return layout.position_ids(checked_rank(name, x, token_dim, layout, cp_group), x.device)


_OPERATORS = Operators("lasp")
_call_positions = _OPERATORS.define(
    "positions(Tensor x, str name, int token_dim, Tensor lengths, int num_ranks, str order,"
    " str group) -> Tensor",
    _positions,
    lambda x, _, token_dim, *__: x.new_empty(x.shape[token_dim], dtype=torch.int64),
)
