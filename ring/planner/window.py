"""Which keys a row sees: all, those before it, or those of a sliding window."""

from __future__ import annotations

from typing import NamedTuple

from ring.planner.ranges import RowRange


class Window(NamedTuple):
    """Keys from ``left`` positions before a row to ``right`` positions after it; -1: no limit.

    A causal mask is a window too. Over keys that are not the rows' own tokens, the last row stands
    at the last key, as in FlashAttention.
    """

    left: int = -1
    right: int = -1

    @property
    def slides(self) -> bool:
        """Whether it is narrower than no mask and than a causal one."""
        return self.left >= 0 or self.right > 0

    def within(self, longest: int) -> Window:
        """The same window over documents of ``longest`` tokens: limits beyond them are none."""
        return Window(*(-1 if side >= longest - 1 > 0 else side for side in self))

    def before(self, fragment: RowRange, start: int) -> RowRange:
        """Positions that rows of ``fragment`` see before it, in a document from ``start`` on."""
        first = start if self.left < 0 else max(start, fragment.start - self.left)
        return RowRange(min(first, fragment.start), fragment.start)

    def after(self, fragment: RowRange, stop: int) -> RowRange:
        """Positions that rows of ``fragment`` see behind it, in a document up to ``stop``."""
        last = stop if self.right < 0 else min(stop, fragment.stop + self.right)
        return RowRange(fragment.stop, max(last, fragment.stop))

    def rows(self, fragment: RowRange, keys: RowRange) -> RowRange:
        """Rows of ``fragment`` that see some of ``keys``, which lie before or behind it."""
        if keys.stop <= fragment.start:
            stop = fragment.stop if self.left < 0 else min(fragment.stop, keys.stop + self.left)
            return RowRange(fragment.start, stop)
        start = fragment.start if self.right < 0 else max(fragment.start, keys.start - self.right)
        return RowRange(start, fragment.stop)

    def aligned(self, rows: RowRange, keys: RowRange) -> Window:
        """This window over positions ``rows`` and ``keys`` as one whose last row and key meet.

        A limit that hides nothing there is none.
        """
        shift = rows.stop - keys.stop
        left = -1 if self.left < 0 else self.left - shift
        right = -1 if self.right < 0 else self.right + shift
        return Window(
            -1 if left >= keys.length - 1 else left, -1 if right >= rows.length - 1 else right
        )

    def pairs(self, length: int) -> int:
        """(row, key) pairs of a fragment of ``length`` tokens with itself."""
        hidden = (length - 1 - side for side in self if side >= 0)
        return length**2 - sum(n * (n + 1) // 2 for n in hidden if n > 0)


EVERYTHING = Window()
CAUSAL = Window(right=0)
