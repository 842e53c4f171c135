"""Do the ranks hold the same :class:`moe_parallel.TokenOrder`? Asked before they rely on it.

The order gives the shapes of the router's all-gathers. Ranks that disagree about it would call one
collective with different sizes, which aborts gloo and hangs NCCL, so they first compare three
numbers each, whose shape nobody can get wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lasp._core.collectives import all_gather
from moe_parallel.mesh import ExpertMesh
from moe_parallel.router.token_order import TokenOrder


def check_order(
    order: TokenOrder,
    num_rows: int,
    token_group: dist.ProcessGroup | None,
    device: torch.device,
    training: bool | None = None,
) -> None:
    """Raise ValueError, on every rank alike, unless all hold this order and the rows it names.

    The ranks compare once; ``order`` remembers the groups that agreed on it. From then on only
    ``num_rows`` of this rank is checked, on the host.

    Args:
        order: where the tokens of every rank stand.
        num_rows: rows this rank passes to the layer, padding included.
        token_group: the ranks of ``order``; None for this rank alone.
        device: of the message.
        training: what the shapes of messages depend on, compared too; None where they do not. All
            ranks must switch together: only the first call in a mode compares. A rank that switches
            alone after it gets the backend's error, or waits for its timeout.

    Communication: the first time for an order object, a group and ``training``, an all-gather of 24
    bytes a rank over ``token_group``, one copy to the device and one back.

    Raises:
        ValueError: naming ``token_order``, or what to call where only some ranks train.
    """
    rank, size = 0, 1
    if token_group is not None:
        rank, size = dist.get_rank(token_group), token_group.size()
    rows_of = {rank: num_rows}
    if token_group is not None and (token_group, training) not in order.agreed_groups:
        mine = torch.tensor([num_rows, order.fingerprint, bool(training)], device=device)
        answers = all_gather(mine, token_group).tolist()
        rows_of = {other: rows for other, (rows, *_) in enumerate(answers)}
        differing = [other for other, answer in enumerate(answers) if answer[1] != answers[0][1]]
        if differing:
            raise ValueError(
                f"token_order must be equal on every rank of groups.token, got another on ranks"
                f" {differing} than on rank 0; the ranks hold {list(rows_of.values())} rows:"
                " build it from the same numbers on all, and pass it if they hold different ones"
            )
        check_training([answer[2] for answer in answers])
    if order.num_ranks != size:
        raise ValueError(
            f"token_order must have one entry for each of the {size} ranks of groups.token,"
            f" got {order.num_ranks}"
        )
    for other, rows in rows_of.items():
        if order.rows_per_rank[other] != rows:
            raise ValueError(
                f"token_order must name the {rows} rows of hidden on rank {other},"
                f" got {order.rows_per_rank[other]}"
            )
    if token_group is not None:
        order.agreed_groups.add((token_group, training))


def check_training(training_R: Sequence[int]) -> None:
    """Raise ValueError unless all ranks train, or none: with a capacity only those drop."""
    ranks = {mode: [r for r, other in enumerate(training_R) if other == mode] for mode in (0, 1)}
    if ranks[0] and ranks[1]:
        raise ValueError(
            "a layer with a capacity_factor must be in one mode on every rank of groups.token, got"
            f" train() on ranks {ranks[1]} and eval() on ranks {ranks[0]}: call the same on all"
        )


def check_counts(assigned_RE: Sequence[Sequence[int]], top_k: int, order: TokenOrder) -> None:
    """Raise ValueError, on every rank alike, if a rank routed other tokens than ``order`` says.

    For orders that every rank assumed by itself and :func:`check_order` did not see.
    """
    for rank, assigned_E in enumerate(assigned_RE):
        expected, routed = order.num_local_tokens(rank), sum(assigned_E) // top_k
        if routed != expected:
            raise ValueError(
                f"token_order must be equal on every rank, got {expected} tokens for rank {rank},"
                f" which routed {routed}: pass it if ranks hold different numbers of tokens"
            )


def checked_rows(
    wait: Callable[[], Sequence[Sequence[int]]], max_rows: int, mesh: ExpertMesh
) -> Sequence[Sequence[int]]:
    """The counts; ValueError, on every rank of the block alike, if one would take too many rows.

    Args:
        wait: returns the rows each rank of the token group sends to each expert.
        max_rows: most rows for the experts of one rank.
        mesh: the EP x ETP block of this rank.
    """
    kept_RE = wait()
    num_local = len(kept_RE[0]) // mesh.ep_size
    for ep_rank in range(mesh.ep_size):
        experts = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
        rows = sum(sum(kept_RE[source][experts]) for source in mesh.sources)
        if rows > max_rows:
            raise ValueError(
                f"max_rows must be at least the rows that the experts of EP rank {ep_rank} are to"
                f" take, got {max_rows} for {rows}: set a capacity_factor, route fewer tokens a"
                " call, or allow more"
            )
    return kept_RE
