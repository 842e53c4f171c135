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
    assert [(step.receives, step.sends) for step in first.steps] == [
        (False, True),
        (True, False),
    ]
    assert [(p.length, p.receives, p.sends) for p in first.fragments] == [(4, False, True)]
    assert [(p.length, p.receives, p.sends) for p in second.fragments] == [
        (1, True, False),
        (3, False, False),
    ]
    first, second = (flow_of(layout, rank, reverse=True) for rank in range(2))
    assert [step.rank for step in first.steps] == [1, 0]
    assert [(p.length, p.receives, p.sends) for p in first.fragments] == [(4, True, False)]
    assert [(p.length, p.receives, p.sends) for p in second.fragments] == [
        (3, False, False),
        (1, False, True),
    ]


@settings(max_examples=100, deadline=None)
@given(layouts)
def test_hops_and_pieces_tell_the_same_story(layout: SequenceLayout) -> None:
    for reverse in (False, True):
        flows = [flow_of(layout, rank, reverse=reverse) for rank in range(layout.num_ranks)]
        steps = flows[0].steps
        assert all(flow.steps == steps for flow in flows)
        assert not steps[0].receives
        assert not steps[-1].sends
        assert all(a.sends == b.receives for a, b in pairwise(steps))
        for flow in flows:
            own = [step for step in steps if step.rank == flow.rank]
            sending = [step for step in own if step.sends]
            assert [step.slot for step in sending] == list(range(len(sending)))
            assert len(sending) <= flow.num_slots
            # Pieces at the borders of a run carry its receives and sends; those inside neither.
            for step in own:
                fragments = [fragment for fragment in flow.fragments if fragment.run == step.run]
                assert sum(fragment.length for fragment in fragments) == step.length
                assert [p.receives for p in fragments] == [step.receives] + [False] * (
                    len(fragments) - 1
                )
                assert [p.sends for p in fragments] == [False] * (len(fragments) - 1) + [step.sends]
                assert step.passes == (len(fragments) == 1 and step.receives and step.sends)


@settings(max_examples=50, deadline=None)
@given(layouts)
def test_reverse_is_the_mirror(layout: SequenceLayout) -> None:
    for rank in range(layout.num_ranks):
        flow, back = flow_of(layout, rank), flow_of(layout, rank, reverse=True)
        mirrored = [p._replace(receives=p.sends, sends=p.receives) for p in flow.fragments]
        assert list(back.fragments) == mirrored[::-1]
        assert flow.num_slots == 0 or back.num_slots > 0


def test_no_document_cut_needs_no_slot() -> None:
    assert flow_of(SequenceLayout((8, 4, 4), 2), 0).num_slots == 0
    assert flow_of(SequenceLayout((7, 5, 4), 2), 0).num_slots == 1
    assert flow_of(SequenceLayout((18,), 3, "zigzag"), 0).num_slots == 2
