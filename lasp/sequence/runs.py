"""Runs, fragments and links: the pieces a layout is made of, and the simple orders."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

TokenRange = tuple[int, int]


class Sections(NamedTuple):
    """Documents and the padding after each, in pack order.

    Attributes:
        borders: cumulative lengths, 0 first.
        documents: index into ``document_lengths`` of each section; N for all padding.
        num_documents: N.
    """

    borders: tuple[int, ...]
    documents: tuple[int, ...]
    num_documents: int

    def at(self, position: int) -> int:
        """Index of the section that holds a token of the pack."""
        return bisect_right(self.borders, position) - 1


class Run(NamedTuple):
    """A maximal interval [start, stop) of the pack held contiguously by one rank."""

    start: int
    stop: int


class Fragment(NamedTuple):
    """The part of one document, or of the padding after it, that lies in one run.

    Attributes:
        document: index into ``document_lengths``; ``len(document_lengths)`` for any padding.
        start: first token, counted from the start of the document (of this padding).
        stop: one past the last token, counted likewise.
        offset: where the fragment starts among the rank's tokens.
        run: index of the run among the rank's runs.
    """

    document: int
    start: int
    stop: int
    offset: int
    run: int


class RealTokens(NamedTuple):
    """A stretch of a rank's tokens without padding.

    Attributes:
        position: of the first token in the pack without any padding.
        offset: of the first token among the rank's tokens.
        length: tokens; they follow each other in both.
    """

    position: int
    offset: int
    length: int


class RunLink(NamedTuple):
    """One run in the global order of the pack, with what a state exchange must know of it.

    Attributes:
        rank: the rank that holds the run.
        run: index of the run among that rank's runs.
        start: first pack position.
        stop: one past the last pack position.
        continues: the run's first token continues a document that began in an earlier run. No
            state flows through padding: a run that begins in it continues nothing.
        passes: the whole run lies inside that document, so that a state flows through all of it.
    """

    rank: int
    run: int
    start: int
    stop: int
    continues: bool
    passes: bool


def sections_of(document_lengths: Sequence[int], padding_lengths: Sequence[int]) -> Sections:
    """Every document, then the padding after it where there is some."""
    num_documents = len(document_lengths)
    lengths, documents = [], []
    for document, (length, padding) in enumerate(zip(document_lengths, padding_lengths)):
        lengths.append(length)
        documents.append(document)
        if padding:
            lengths.append(padding)
            documents.append(num_documents)
    return Sections(tuple(accumulate(lengths, initial=0)), tuple(documents), num_documents)


def contiguous_runs(num_tokens: int, num_ranks: int) -> list[list[TokenRange]]:
    """One run a rank, in rank order."""
    tokens = num_tokens // num_ranks
    return [[(rank * tokens, (rank + 1) * tokens)] for rank in range(num_ranks)]


def zigzag_runs(borders: Sequence[int], num_ranks: int) -> list[list[TokenRange]]:
    """Pieces r and 2P - 1 - r of the 2P equal ones of every interval between two borders.

    Pieces that touch are one run: the middle ones on the last rank; on the first rank the last
    piece of an interval and the first of the next.
    """
    if num_ranks == 1:
        return [[(0, borders[-1])]]
    runs: list[list[TokenRange]] = [[] for _ in range(num_ranks)]
    for start, stop in pairwise(borders):
        piece = (stop - start) // (2 * num_ranks)
        for rank in range(num_ranks if piece else 0):
            of_rank = runs[rank]
            for index in (rank, 2 * num_ranks - 1 - rank):
                first = start + index * piece
                if of_rank and of_rank[-1][1] == first:
                    first = of_rank.pop()[0]
                of_rank.append((first, start + (index + 1) * piece))
    return runs


def cut_at_borders(runs: Sequence[TokenRange], sections: Sections) -> Iterator[Fragment]:
    """Fragments of one rank: its runs cut at the borders of sections, empty ones left out."""
    borders, documents, _ = sections
    offset = 0
    for index, (position, end) in enumerate(runs):
        section = sections.at(position)
        while position < end:
            stop = min(borders[section + 1], end)
            if stop > position:
                start = position - borders[section]
                yield Fragment(documents[section], start, start + stop - position, offset, index)
                offset += stop - position
                position = stop
            section += 1


def link_runs(runs_of_ranks: Sequence[Sequence[TokenRange]], sections: Sections) -> list[RunLink]:
    """All runs of all ranks in pack order."""
    links: list[RunLink] = []
    for rank, runs in enumerate(runs_of_ranks):
        for index, (start, stop) in enumerate(runs):
            section = sections.at(start)
            real = sections.documents[section] < sections.num_documents
            continues = real and sections.borders[section] < start
            passes = continues and sections.borders[section + 1] >= stop
            links.append(RunLink(rank, index, start, stop, continues, passes))
    return sorted(links, key=lambda link: link.start)


def real_tokens(
    fragments: Sequence[Fragment], document_lengths: Sequence[int]
) -> Iterator[RealTokens]:
    """The fragments of one rank without those of padding, joined where they follow each other."""
    starts = tuple(accumulate(document_lengths, initial=0))
    last: RealTokens | None = None
    for document, start, stop, offset, _ in fragments:
        if document == len(document_lengths):
            continue
        stretch = RealTokens(starts[document] + start, offset, stop - start)
        if last is not None:
            position, row, length = last
            if (stretch.position, offset) == (position + length, row + length):
                stretch = RealTokens(position, row, length + stretch.length)
            else:
                yield last
        last = stretch
    if last is not None:
        yield last
