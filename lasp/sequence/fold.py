"""The ``fold`` order: equal tokens and equal causal attention time with about two runs a rank.

A token late in a long document attends to many keys (heavy), one early in its document to few
(light). ``fold`` cuts the pack into heavy and light intervals at the mean density and gives every
rank some tokens from the front of each list, split so that its work is the mean. Every rank
computes the same plan from the document lengths alone.

Why it closes: with nothing absorbed every heavy token is denser than the mean and every light one
at most as dense, so the work of "a heavy tokens, T - a light tokens" grows with a and bisection
finds the mean; what is left over keeps the mean density, so neither list runs out first. Absorbing
short heavy tails into the light list bounds the number of runs and makes this approximate, so the
result is checked and the next smaller absorb fraction tried. Packs of a few hundred tokens a rank,
or of documents about as long as a rank's share, may end up to a tenth above the mean.

A document costs more than its pairs: its last tiles of rows and keys are partly empty, which counts
where documents are short. So work is pairs, and ``DOCUMENT_PAIRS`` for each document; only whether
a token is heavy is told by its pairs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

from lasp.sequence.runs import TokenRange

# Largest first: the more is absorbed, the fewer the runs. The second row is for the rare pack that
# nothing in the first suits (documents about as long as a rank's share).
ABSORB_FRACTIONS = (
    *(1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.02, 0.0),
    *(0.85, 0.6, 0.42, 0.3, 0.21, 0.15, 0.1, 0.065, 0.035),
)
MAX_WORK_RATIO = 1.03
# 6.5 us of forward and backward, at 0.158 ns a pair: FlashAttention-4 on an H200, 64 heads of 128,
# documents of 64 to 8192 tokens. It holds for packs of documents of 5 to 100 tokens within 2 %.
DOCUMENT_PAIRS = 41_000
MAX_RUNS = 5


class WorkIndex:
    """Causal attention work, in (query, key) pairs, of any interval of a pack.

    Args:
        borders: N + 1 cumulative document lengths, starting at 0.
        window: tokens before itself that a query sees; None: all.
        document_pairs: work of the beginning of each document, beside its pairs.
    """

    def __init__(
        self, borders: Sequence[int], window: int | None = None, document_pairs: int = 0
    ) -> None:
        self.borders, self._window, self._document_pairs = borders, window, document_pairs
        self._before = [0]  # work of all documents before document n
        for start, stop in pairwise(borders):
            self._before.append(self._before[-1] + self._of(stop - start))

    def until(self, position: int) -> int:
        """Work of pack positions [0, position)."""
        document = bisect_right(self.borders, position) - 1
        inside = position - self.borders[document]
        return self._before[document] + self._of(inside)

    def _of(self, tokens: int) -> int:
        """Work of the first tokens of a document."""
        beyond = 0 if self._window is None else max(0, tokens - 1 - self._window)
        pairs = (tokens * (tokens + 1) - beyond * (beyond + 1)) // 2
        return pairs + self._document_pairs if tokens else 0

    def between(self, start: int, stop: int) -> int:
        """Work of pack positions [start, stop)."""
        return self.until(stop) - self.until(start)


class _Queue:
    """Intervals consumed from the front, token by token, with their work."""

    def __init__(self, intervals: Sequence[TokenRange], work: WorkIndex) -> None:
        self._intervals = intervals
        self._work = work
        self._tokens = [0]
        self._works = [0]
        for start, stop in intervals:
            self._tokens.append(self._tokens[-1] + stop - start)
            self._works.append(self._works[-1] + work.between(start, stop))
        self._taken = 0
        self._work_taken = 0

    def __len__(self) -> int:
        return self._tokens[-1] - self._taken

    def work_of(self, count: int) -> int:
        """Work of the next ``count`` tokens."""
        return self._work_until(self._taken + count) - self._work_taken

    def _work_until(self, tokens: int) -> int:
        index = bisect_right(self._tokens, tokens) - 1
        work = self._works[index]
        if index < len(self._intervals) and tokens > self._tokens[index]:
            start = self._intervals[index][0]
            work += self._work.between(start, start + tokens - self._tokens[index])
        return work

    def take(self, count: int) -> list[TokenRange]:
        """Remove and return the next ``count`` tokens as intervals."""
        taken: list[TokenRange] = []
        position, end = self._taken, self._taken + count
        while position < end:
            index = bisect_right(self._tokens, position) - 1
            upto = min(end, self._tokens[index + 1])
            start = self._intervals[index][0] - self._tokens[index]
            taken.append((start + position, start + upto))
            position = upto
        self._taken = end
        self._work_taken = self._work_until(end)
        return taken


def fold_runs(borders: Sequence[int], num_ranks: int) -> list[list[TokenRange]]:
    """Runs of every rank under the fold order.

    Args:
        borders: cumulative document lengths, 0 first; the last must divide by ``num_ranks``.
        num_ranks: P.

    Returns:
        For each rank its runs, sorted by position, T = borders[-1] / P tokens in all.
    """
    work = WorkIndex(borders, document_pairs=DOCUMENT_PAIRS)
    mean_work = work.until(borders[-1]) / num_ranks
    mean_density = WorkIndex(borders).until(borders[-1]) // borders[-1]
    plans: list[tuple[float, int, int, list[list[TokenRange]]]] = []
    for absorb in ABSORB_FRACTIONS:
        runs = _assign(borders, work, num_ranks, absorb, mean_density)
        heaviest = max(sum(work.between(*run) for run in rank_runs) for rank_runs in runs)
        ratio, most_runs = heaviest / mean_work, max(map(len, runs))
        if ratio <= MAX_WORK_RATIO and most_runs <= MAX_RUNS:
            return runs
        # Not both: balance first, then runs.
        plans.append((max(ratio, MAX_WORK_RATIO), most_runs, len(plans), runs))
    return min(plans)[-1]


def _split(
    borders: Sequence[int], mean_density: int, granularity: int, absorb_tokens: float
) -> tuple[list[TokenRange], list[TokenRange]]:
    """Heavy and light intervals; touching light intervals of successive documents are one."""
    heavy: list[TokenRange] = []
    light: list[TokenRange] = []
    current = 0
    for start, stop in pairwise(borders):
        border = -(-(start + mean_density) // granularity) * granularity
        if border + max(granularity, absorb_tokens) < stop:
            if border > current:
                light.append((current, border))
            heavy.append((border, stop))
            current = stop
    if borders[-1] > current:
        light.append((current, borders[-1]))
    return heavy, light


def _assign(
    borders: Sequence[int], work: WorkIndex, num_ranks: int, absorb: float, mean_density: int
) -> list[list[TokenRange]]:
    total_tokens, total_work = borders[-1], work.until(borders[-1])
    tokens = total_tokens // num_ranks
    # Cuts fall on multiples of the granularity where they can, so that kernels see round blocks.
    granularity = 64 if tokens >= 16384 else 16 if tokens >= 256 else 1
    heavy_intervals, light_intervals = _split(borders, mean_density, granularity, absorb * tokens)
    heavy, light = _Queue(heavy_intervals, work), _Queue(light_intervals, work)
    work_left = total_work
    runs: list[list[TokenRange]] = []
    for rank in range(num_ranks):
        low, high = max(0, tokens - len(light)), min(tokens, len(heavy))
        target = work_left / (num_ranks - rank)
        if rank == num_ranks - 1:
            count = len(heavy)
        else:
            count = low + bisect_left(
                range(low, high),
                target,
                key=lambda a: heavy.work_of(a) + light.work_of(tokens - a),
            )
            rounded = (count + granularity // 2) // granularity * granularity
            count = min(max(rounded, low), high)
        work_left -= heavy.work_of(count) + light.work_of(tokens - count)
        runs.append(_merge(heavy.take(count) + light.take(tokens - count)))
    return runs


def _merge(intervals: list[TokenRange]) -> list[TokenRange]:
    """Sort by position and join touching intervals."""
    merged: list[TokenRange] = []
    for start, stop in sorted(intervals):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
