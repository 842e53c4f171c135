from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import flow_of
from tests.lasp.cases import ORDERS

layouts = st.builds(
    SequenceLayout,
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any).map(tuple),
    st.integers(1, 5),
    st.sampled_from((*ORDERS, "document_zigzag")),
)


def test_example_of_the_module() -> None:
    layout = SequenceLayout((5, 3), 2)
    first, second = (flow_of(layout, rank) for rank in range(2))
    assert [(hop.receives, hop.sends) for hop in first.hops] == [(False, True), (True, False)]
    assert [(p.length, p.receives, p.sends) for p in first.pieces] == [(4, False, True)]
    assert [(p.length, p.receives, p.sends) for p in second.pieces] == [
        (1, True, False),
        (3, False, False),
    ]
    first, second = (flow_of(layout, rank, reverse=True) for rank in range(2))
    assert [hop.rank for hop in first.hops] == [1, 0]
    assert [(p.length, p.receives, p.sends) for p in first.pieces] == [(4, True, False)]
    assert [(p.length, p.receives, p.sends) for p in second.pieces] == [
        (3, False, False),
        (1, False, True),
    ]


@settings(max_examples=100, deadline=None)
@given(layouts)
def test_hops_and_pieces_tell_the_same_story(layout: SequenceLayout) -> None:
    for reverse in (False, True):
        flows = [flow_of(layout, rank, reverse=reverse) for rank in range(layout.num_ranks)]
        hops = flows[0].hops
        assert all(flow.hops == hops for flow in flows)
        assert not hops[0].receives
        assert not hops[-1].sends
        assert all(a.sends == b.receives for a, b in pairwise(hops))
        for flow in flows:
            own = [hop for hop in hops if hop.rank == flow.rank]
            sending = [hop for hop in own if hop.sends]
            assert [hop.slot for hop in sending] == list(range(len(sending)))
            assert len(sending) <= flow.num_slots
            # Pieces at the borders of a run carry its receives and sends; those inside neither.
            for hop in own:
                pieces = [piece for piece in flow.pieces if piece.run == hop.run]
                assert sum(piece.length for piece in pieces) == hop.length
                assert [p.receives for p in pieces] == [hop.receives] + [False] * (len(pieces) - 1)
                assert [p.sends for p in pieces] == [False] * (len(pieces) - 1) + [hop.sends]
                assert hop.passes == (len(pieces) == 1 and hop.receives and hop.sends)


@settings(max_examples=50, deadline=None)
@given(layouts)
def test_reverse_is_the_mirror(layout: SequenceLayout) -> None:
    for rank in range(layout.num_ranks):
        flow, back = flow_of(layout, rank), flow_of(layout, rank, reverse=True)
        mirrored = [p._replace(receives=p.sends, sends=p.receives) for p in flow.pieces]
        assert list(back.pieces) == mirrored[::-1]
        assert flow.num_slots == 0 or back.num_slots > 0


def test_no_document_cut_needs_no_slot() -> None:
    assert flow_of(SequenceLayout((8, 4, 4), 2), 0).num_slots == 0
    assert flow_of(SequenceLayout((7, 5, 4), 2), 0).num_slots == 1
    assert flow_of(SequenceLayout((18,), 3, "zigzag"), 0).num_slots == 2
