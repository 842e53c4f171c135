"""Ranks that hold different batches learn it where the batch is made, all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from lasp.hybrid import pack_batch
from lasp.sequence.layout import Order, SequenceLayout
from tests.ranks import run_on_ranks

ORDERS: tuple[Order, ...] = ("zigzag", "fold")


def on_rank(*values: Any) -> Any:
    return values[dist.get_rank()]


def layout_errors() -> list[str]:
    """What ranks are told whose layouts differ in one argument."""
    layouts = (
        SequenceLayout(on_rank((30, 34), (34, 30)), 2),
        SequenceLayout(on_rank((32, 32), (64,)), 2),
        SequenceLayout((64,), 2, on_rank(*ORDERS)),
        SequenceLayout((30,), 2, "contiguous", on_rank((32,), (34,))),
    )
    errors = []
    for layout in layouts:
        with pytest.raises(ValueError, match="equal on every rank") as error:
            layout.check_same_on_ranks(dist.group.WORLD)
        errors.append(str(error.value))
    SequenceLayout((30, 34), 2, "fold").check_same_on_ranks(dist.group.WORLD)
    return errors


def test_ranks_with_different_layouts_are_told_who_holds_what() -> None:
    errors, of_rank_1 = run_on_ranks(layout_errors, 2)
    assert errors == of_rank_1
    assert "ranks [0] hold 2 documents of 64 tokens over 2 ranks, order contiguous" in errors[0]
    assert "ranks [0] hold 2 documents" in errors[1]
    assert "ranks [1] hold 1 documents" in errors[1]
    assert "ranks [0] hold 1 documents of 64 tokens over 2 ranks, order zigzag" in errors[2]
    assert all("broadcast" in error for error in errors)


def batch_errors() -> list[str]:
    """As above, of three ranks two of which agree, and of one batch on which all do."""
    settings: dict[str, Any] = {
        "dp_rank": 0,
        "order": "contiguous",
        "group": dist.group.WORLD,
    }
    calls = (
        ([on_rank((5, 7), (7, 5), (5, 7)), (9,)], 1),
        ([(5, 7), (9,)], on_rank(1, 1, 2)),
        ([(5, 7), on_rank((9,), (9,), (9, 0))], 1),
        ([(5, 7), on_rank((9,), (9,), (0,))], 1),  # which no layout takes
        ([(5, 7), (9,)][: on_rank(2, 2, 1)], 1),
    )
    errors = []
    for lengths, num_ranks in calls:
        with pytest.raises(ValueError, match="must be equal on every rank") as error:
            pack_batch(lengths, num_ranks=num_ranks, **settings)
        errors.append(str(error.value))
    for wrong in (-1, None):  # -1 would be the last replica's
        with pytest.raises(ValueError) as error:
            pack_batch([(5, 7), (9,)], num_ranks=1, **settings | {"dp_rank": on_rank(0, 0, wrong)})
        errors.append(str(error.value))
    settings["dp_rank"] = dist.get_rank() % 2  # a rank's own place may differ
    pack_batch([(5, 7), (9,)], num_ranks=1, **settings)
    return errors


def test_ranks_with_different_packs_are_told_who_holds_what() -> None:
    errors, *others = run_on_ranks(batch_errors, 3)
    assert others == [errors, errors]
    assert "ranks [0, 2] hold 3 documents of 21 tokens in 2 replicas" in errors[0]
    assert "ranks [0, 1] hold" in errors[1]
    assert "ranks [2] hold" in errors[1]
    assert "ranks [2] hold 4 documents of 21 tokens" in errors[2]
    assert "ranks [2] hold no pack: document_lengths must hold at least one token" in errors[3]
    assert "ranks [2] hold 2 documents of 12 tokens in 1 replicas" in errors[4]
    for error in errors[5:]:
        assert "ranks [2] hold no pack: dp_rank must be in [0, 2)" in error


def refused_alike() -> str:
    with pytest.raises(ValueError) as error:
        pack_batch([(0,)], dp_rank=0, num_ranks=1, order="fold", group=dist.group.WORLD)
    return str(error.value)


def test_what_no_rank_can_pack_is_refused_as_by_one() -> None:
    for error in run_on_ranks(refused_alike, 2):
        assert error.startswith("document_lengths must hold at least one token")
