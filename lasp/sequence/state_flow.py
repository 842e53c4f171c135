"""A layout as one direction of the recurrence sees it: where states come from and where they go.

Forward, states flow from a document's start to its end; backward, their gradients flow from its end
to its start. Both are the same walk over the same runs and fragments, in opposite order and with
"receives" and "sends" exchanged, so everything downstream is written once for a :class:`Flow`.

Example: one document of 5 tokens and one of 3 over 2 ranks, contiguous (runs 0:4 and 4:8)::

    pack      0 1 2 3 | 4   0 1 2
    forward   hops    run 0: sends           run 1: receives
              pieces  rank 0: 0:4 sends      rank 1: 4:5 receives, 0:3 neither
    reverse   hops    run 1: sends           run 0: receives
              pieces  rank 1: 0:3 neither, 4:5 sends      rank 0: 0:4 receives

Every document starts from a *given* state (forward its initial state, reverse the gradient of its
final state, zero by default) and leaves a *result* (its final state; the initial state's gradient).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from lasp.sequence.layout import SequenceLayout


class Hop(NamedTuple):
    """One run of any rank, a station on the way of the states through the pack.

    Attributes:
        rank: the rank that holds the run.
        run: index of the run among that rank's runs.
        length: tokens of the run.
        receives: a state comes in from the hop before.
        sends: a state goes on to the hop after.
        passes: what comes in goes on: the whole run lies inside one document.
        slot: index among the sending runs of the rank, in the order of the flow.
    """

    rank: int
    run: int
    length: int
    receives: bool
    sends: bool
    passes: bool
    slot: int


class Piece(NamedTuple):
    """One fragment of this rank.

    Attributes:
        document: index into the given states and the results; None for padding.
        length: tokens of the fragment.
        offset: where the fragment starts among the rank's tokens.
        run: index of the run among the rank's runs.
        receives: its state comes in from another run; else it starts from the given state.
        sends: its state goes on to another run; else it is the result of the document.
    """

    document: int | None
    length: int
    offset: int
    run: int
    receives: bool
    sends: bool


class Flow(NamedTuple):
    """What one rank must know of one direction.

    Attributes:
        rank: this rank.
        reverse: states flow from the end of the pack to its start.
        hops: all runs of all ranks, in the order of the flow.
        pieces: fragments of this rank, in the order of the flow.
        num_runs: runs of this rank.
        num_slots: most sending runs of any one rank; 0 if no document is cut, the same on all.
        shortest_pass: tokens of the shortest run of any rank that a state passes through, if any.
        num_documents: N.
        empty_documents: documents of no token whose states this rank keeps (rank 0 keeps all).
    """

    rank: int
    reverse: bool
    hops: tuple[Hop, ...]
    pieces: tuple[Piece, ...]
    num_runs: int
    num_slots: int
    shortest_pass: int | None
    num_documents: int
    empty_documents: tuple[int, ...]


@lru_cache(maxsize=64)  # a few batches in flight, both directions
def flow_of(layout: SequenceLayout, rank: int, *, reverse: bool = False) -> Flow:
    """The flow of ``layout`` seen from ``rank``; pure, remembered because every layer asks."""
    hops = _hops(layout, reverse)
    lengths = layout.document_lengths
    return Flow(
        rank=rank,
        reverse=reverse,
        hops=hops,
        pieces=_pieces(layout, rank, reverse),
        num_runs=len(layout.runs(rank)),
        num_slots=1 + max((hop.slot for hop in hops if hop.sends), default=-1),
        shortest_pass=min((hop.length for hop in hops if hop.passes), default=None),
        num_documents=layout.num_documents,
        empty_documents=tuple(n for n, length in enumerate(lengths) if length == 0 and rank == 0),
    )


def _hops(layout: SequenceLayout, reverse: bool) -> tuple[Hop, ...]:
    links = layout.run_links
    slots = [0] * layout.num_ranks
    hops = []
    for j in reversed(range(len(links))) if reverse else range(len(links)):
        link = links[j]
        before, after = link.continues, j + 1 < len(links) and links[j + 1].continues
        receives, sends = (after, before) if reverse else (before, after)
        hops.append(
            Hop(
                rank=link.rank,
                run=link.run,
                length=link.stop - link.start,
                receives=receives,
                sends=sends,
                passes=link.passes and receives and sends,
                slot=slots[link.rank],
            )
        )
        slots[link.rank] += sends
    return tuple(hops)


def _pieces(layout: SequenceLayout, rank: int, reverse: bool) -> tuple[Piece, ...]:
    pieces = []
    for fragment in layout.fragments(rank):
        document = fragment.document if fragment.document < layout.num_documents else None
        before, after = False, False  # no state flows through padding
        if document is not None:
            before, after = fragment.start > 0, fragment.stop < layout.document_lengths[document]
        pieces.append(
            Piece(
                document=document,
                length=fragment.stop - fragment.start,
                offset=fragment.offset,
                run=fragment.run,
                receives=after if reverse else before,
                sends=before if reverse else after,
            )
        )
    return tuple(reversed(pieces) if reverse else pieces)
