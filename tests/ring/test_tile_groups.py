"""Rows and keys of tiles, side by side for one call of a kernel."""

from __future__ import annotations

import torch

from ring.planner.ranges import RowRange
from ring.planner.tiles import KVTile
from ring.tile_groups import gather

Q = torch.randn(9, 2, 4)
OWN, RECEIVED = ((torch.randn(9, 1, 4), torch.randn(9, 1, 3)) for _ in range(2))


def tile(rows: tuple[int, int], *keys: tuple[int, int], own: tuple[int, int] | None = None):
    ranges = tuple(RowRange(*some) for some in keys)
    return KVTile(0, RowRange(*rows), ranges, own=() if own is None else (RowRange(*own),))


def test_own_keys_come_before_those_received() -> None:
    # The received keys begin at the row where the own ones end: they do not follow in memory.
    q, k, v = gather([tile((3, 5), (2, 4), own=(0, 2))], Q, OWN, RECEIVED)
    assert torch.equal(q, Q[3:5])
    for x, own, received in zip((k, v), OWN, RECEIVED):
        assert torch.equal(x, torch.cat((own[0:2], received[2:4])))


def test_keys_that_follow_each_other_are_not_copied() -> None:
    group = [tile((0, 4), (1, 3)), tile((4, 6), (3, 8))]
    q, k, v = gather(group, Q, OWN, RECEIVED)
    assert torch.equal(q, Q[0:6])
    for x, received in zip((k, v), RECEIVED):
        assert torch.equal(x, received[1:8])
        assert x.data_ptr() == received[1:].data_ptr()


def test_keys_of_several_tiles_are_copied_where_they_overlap() -> None:
    group = [tile((0, 4), (1, 3)), tile((4, 6), (2, 8))]
    _, k, v = gather(group, Q, OWN, RECEIVED)
    for x, received in zip((k, v), RECEIVED):
        assert torch.equal(x, torch.cat((received[1:3], received[2:8])))
