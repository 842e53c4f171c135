"""Runs, fragments and links: the pieces a layout is made of, and the two simple orders."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Interval = tuple[int, int]


class Run(NamedTuple):
    """A maximal interval [start, stop) of the pack held contiguously by one rank."""

    start: int
    stop: int


class Fragment(NamedTuple):
    """The part of one document that lies in one run.

    Attributes:
        document: index into ``document_lengths``; ``len(document_lengths)`` is the tail padding.
        start: first token, counted from the start of the document.
        stop: one past the last token, counted from the start of the document.
        offset: where the fragment starts among the rank's tokens.
        run: index of the run among the rank's runs.
    """

    document: int
    start: int
    stop: int
    offset: int
    run: int


class RunLink(NamedTuple):
    """One run in the global order of the pack, with what a state exchange must know of it.

    Attributes:
        rank: the rank that holds the run.
        run: index of the run among that rank's runs.
        start: first pack position.
        stop: one past the last pack position.
        continues: the run's first token continues a document that began in an earlier run.
        passes: no document starts anywhere in the run, so that a state flows through all of it.
    """

    rank: int
    run: int
    start: int
    stop: int
    continues: bool
    passes: bool


def contiguous_runs(num_tokens: int, num_ranks: int) -> list[list[Interval]]:
    """One run a rank, in rank order."""
    tokens = num_tokens // num_ranks
    return [[(rank * tokens, (rank + 1) * tokens)] for rank in range(num_ranks)]


def zigzag_runs(num_tokens: int, num_ranks: int) -> list[list[Interval]]:
    """Pieces r and 2P - 1 - r of 2P equal ones; those of the last rank touch and are one run."""
    if num_ranks == 1:
        return [[(0, num_tokens)]]
    piece = num_tokens // (2 * num_ranks)
    starts = [(rank * piece, (2 * num_ranks - 1 - rank) * piece) for rank in range(num_ranks - 1)]
    runs = [[(start, start + piece) for start in pair] for pair in starts]
    return [*runs, [((num_ranks - 1) * piece, (num_ranks + 1) * piece)]]


def cut_at_borders(runs: Sequence[Interval], borders: Sequence[int]) -> Iterator[Fragment]:
    """Fragments of one rank: its runs cut at cumulative document lengths, empty ones left out."""
    offset = 0
    for index, (position, end) in enumerate(runs):
        document = bisect_right(borders, position) - 1
        while position < end:
            stop = min(borders[document + 1], end)
            if stop > position:
                start = position - borders[document]
                yield Fragment(document, start, start + stop - position, offset, index)
                offset += stop - position
                position = stop
            document += 1
