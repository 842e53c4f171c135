"""Ranges of rows, and where positions of the pack lie among the tokens that a rank holds."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple


class RowRange(NamedTuple):
    """Rows [start, stop) of the pack, of a rank's tokens or of a kv buffer, as the holder says."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of rows."""
        return self.stop - self.start


class TokenIndex:
    """Disjoint ranges of the pack, end to end: the tokens of a rank, or a kv buffer."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.ranges = tuple(RowRange(*some) for some in ranges)
        self.length = sum(some.length for some in self.ranges)
        ends = accumulate((some.length for some in self.ranges), initial=0)
        self._sorted = sorted((r.start, r.stop, offset) for r, offset in zip(self.ranges, ends))

    def find(self, start: int, stop: int) -> RowRange:
        """Where positions [start, stop) of the pack, all within one of the ranges, lie."""
        first, _, offset = self._sorted[bisect_right(self._sorted, (start, sys.maxsize)) - 1]
        return RowRange(start - first + offset, stop - first + offset)

    def parts(self, want: RowRange) -> list[tuple[RowRange, RowRange]]:
        """The held parts of ``want``: where they lie, and their positions; joined if both meet."""
        found: list[tuple[RowRange, RowRange]] = []
        for start, stop, offset in self._sorted:
            low, high = max(start, want.start), min(stop, want.stop)
            if low >= high:
                continue
            held = RowRange(low - start + offset, high - start + offset)
            if found and found[-1][0].stop == held.start and found[-1][1].stop == low:
                before = found.pop()
                held, low = RowRange(before[0].start, held.stop), before[1].start
            found.append((held, RowRange(low, high)))
        return found

    def overlap(self, wanted: Iterable[RowRange]) -> tuple[RowRange, ...]:
        """Where the held part of some ranges of the pack lies: sorted, adjacent ranges joined."""
        return union(
            RowRange(max(start, want.start) - start + offset, min(stop, want.stop) - start + offset)
            for start, stop, offset in self._sorted
            for want in wanted
            if max(start, want.start) < min(stop, want.stop)
        )


class LentTokens(NamedTuple):
    """Own tokens that rows of other runs or of other ranks see.

    Attributes:
        tokens: where they are.
        once: each of them gets one gradient from there, not several.
    """

    tokens: TokenIndex
    once: bool


def union(ranges: Iterable[RowRange]) -> tuple[RowRange, ...]:
    """Rows in any of the ranges: sorted; what meets or overlaps is joined."""
    joined: list[RowRange] = []
    for start, stop in sorted(ranges):
        if joined and start <= joined[-1].stop:
            joined[-1] = RowRange(joined[-1].start, max(stop, joined[-1].stop))
        else:
            joined.append(RowRange(start, stop))
    return tuple(joined)
