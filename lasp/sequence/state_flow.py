"""A layout as one direction of the recurrence sees it: where states come from and where they go.

Forward, states flow from a document's start to its end. Backward, gradients of states flow from its
end to its start. Both walk over the same runs and fragments, in opposite order and with "receives"
and "sends" exchanged. So everything downstream is written once, for a :class:`StateFlow`.

Example: one document of 5 tokens and one of 3 over 2 ranks, contiguous (runs 0:4 and 4:8)::

    pack      0 1 2 3 | 4   0 1 2
    forward   steps      run 0: sends           run 1: receives
              fragments  rank 0: 0:4 sends      rank 1: 4:5 receives, 0:3 neither
    reverse   steps      run 1: sends           run 0: receives
              fragments  rank 1: 0:3 neither, 4:5 sends      rank 0: 0:4 receives

In either direction a document starts from an initial state, zero by default, and leaves a final
state. In reverse the initial state is the gradient of the document's final state, and the final
state is the gradient of its initial state.
"""

from __future__ import annotations

from typing import NamedTuple

from lasp._core.cache import ByteCache, kept_in
from lasp.sequence.layout import SequenceLayout


class RunStep(NamedTuple):
    """One run of any rank, as a step of the states on their way through the pack.

    Attributes:
        rank: the rank that holds the run.
        run: index of the run among that rank's runs.
        length: tokens of the run.
        receives: a state comes in from the step before.
        sends: a state goes on to the step after.
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


class DirectedFragment(NamedTuple):
    """One fragment of this rank, in one direction.

    Attributes:
        document: index into the initial and final states; None for padding.
        length: tokens of the fragment.
        offset: where the fragment starts among the rank's tokens.
        run: index of the run among the rank's runs.
        receives: its state comes in from another run; else it starts from the initial state.
        sends: its state goes on to another run; else it is the document's final state.
    """

    document: int | None
    length: int
    offset: int
    run: int
    receives: bool
    sends: bool


class StateFlow(NamedTuple):
    """One direction of the recurrence, as one rank sees it.

    Attributes:
        rank: this rank.
        reverse: states flow from the end of the pack to its start.
        steps: all runs of all ranks, in the order of the flow.
        fragments: fragments of this rank, in the order of the flow.
        num_runs: runs of this rank.
        num_slots: most sending runs of any one rank; 0 if no document is cut, the same on all.
        num_documents: N.
        empty_documents: documents of no token whose states this rank keeps (rank 0 keeps all).
    """

    rank: int
    reverse: bool
    steps: tuple[RunStep, ...]
    fragments: tuple[DirectedFragment, ...]
    num_runs: int
    num_slots: int
    num_documents: int
    empty_documents: tuple[int, ...]


# A few batches in flight, both directions. Each keeps its layout too.
_FLOWS: ByteCache[StateFlow] = ByteCache(
    128 * 2**20, lambda flow: 768 * len(flow.fragments) + 128 * len(flow.steps)
)


@kept_in(_FLOWS)
def flow_of(layout: SequenceLayout, rank: int, *, reverse: bool = False) -> StateFlow:
    """The flow of ``layout`` seen from ``rank``; pure, remembered because every layer asks."""
    steps = _run_steps(layout, reverse)
    lengths = layout.document_lengths
    return StateFlow(
        rank=rank,
        reverse=reverse,
        steps=steps,
        fragments=_directed_fragments(layout, rank, reverse),
        num_runs=len(layout.runs(rank)),
        num_slots=1 + max((step.slot for step in steps if step.sends), default=-1),
        num_documents=layout.num_documents,
        empty_documents=tuple(n for n, length in enumerate(lengths) if length == 0 and rank == 0),
    )


def _run_steps(layout: SequenceLayout, reverse: bool) -> tuple[RunStep, ...]:
    links = layout.run_links
    slots = [0] * layout.num_ranks
    steps = []
    for j in reversed(range(len(links))) if reverse else range(len(links)):
        link = links[j]
        before, after = link.continues, j + 1 < len(links) and links[j + 1].continues
        receives, sends = (after, before) if reverse else (before, after)
        steps.append(
            RunStep(
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
    return tuple(steps)


def _directed_fragments(
    layout: SequenceLayout, rank: int, reverse: bool
) -> tuple[DirectedFragment, ...]:
    directed = []
    for fragment in layout.fragments(rank):
        document = fragment.document if fragment.document < layout.num_documents else None
        before, after = False, False  # no state flows through padding
        if document is not None:
            before, after = fragment.start > 0, fragment.stop < layout.document_lengths[document]
        directed.append(
            DirectedFragment(
                document=document,
                length=fragment.stop - fragment.start,
                offset=fragment.offset,
                run=fragment.run,
                receives=after if reverse else before,
                sends=before if reverse else after,
            )
        )
    return tuple(reversed(directed) if reverse else directed)
