"""What the kernels are told about a pack, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp.lightning.attention import lightning_attention
from lasp.lightning.triton import chunk_state as state_pass
from lasp.lightning.triton import segments
from lasp.lightning.triton.segments import Plan, plan_of
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import flow_of
from tests.lasp.lightning.test_kernels import DEVICE, small_blocks


def plan(lengths: tuple[int, ...], length: int, **options: bool) -> Plan:
    options = {"reverse": False, "with_initial": False, "with_final": True} | options
    return plan_of(SequenceLayout(lengths, 1), 0, torch.device("cpu"), length=length, **options)


@pytest.mark.parametrize("reverse", [False, True])
def test_only_segments_that_hand_a_state_on_have_sums(reverse: bool) -> None:
    """A document whose final state is asked for is a segment of its own, and mostly the last."""
    lengths = (5,) * 50 + (300,) + (7,) * 50
    of_pack = plan(lengths, 128, reverse=reverse)
    assert len(of_pack.segments) == 103
    assert of_pack.summed.tolist() == [list(s) for s in of_pack.segments if s.state_length]
    assert [s.sum_row for s in of_pack.segments if s.sum_row >= 0] == [0, 1]
    assert [s.state_row for s in of_pack.segments if s.state_row >= 0] == [0, 1]
    assert of_pack.num_states == 2
    assert plan((5,) * 4, 128).summed.shape[0] == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_documents_share_segments_where_no_state_is_asked_for(reverse: bool) -> None:
    lengths = (5, 0, 40, 300)
    assert plan(lengths, 64, reverse=reverse, with_final=False).shared
    assert not plan(lengths, 64, reverse=reverse).shared
    assert not plan(lengths, 64, reverse=reverse, with_final=False, with_initial=True).shared
    assert not plan((345,), 64, reverse=reverse, with_final=False).shared


def test_sums_and_programs_are_of_few_segments() -> None:
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> Any:
                launched.append((grid[0], args[2].shape[0]))
                return kernel[grid](*args, **options)

            return launch

    kernel = state_pass.chunk_state_kernel
    x, rates = torch.randn(120, 1, 32, device=DEVICE), torch.zeros(1, device=DEVICE)
    layout = SequenceLayout((4,) * 10 + (40,) + (4,) * 10, 1)
    with small_blocks(), patch.object(state_pass, "chunk_state_kernel", Kernel()):
        lightning_attention(x, x, x, rates, layout=layout, impl="triton", output_final_state=True)
    assert launched == [(2, 1)]  # two parts of the 32 tokens that end one segment of 22


class Counted(tuple):
    """Counts what is looked at."""

    looks = 0

    def __iter__(self) -> Iterator[Any]:
        for x in super().__iter__():
            Counted.looks += 1
            yield x


@pytest.mark.parametrize("result", [False, True])
def test_planning_looks_at_each_piece_a_few_times(result: bool) -> None:
    """However many documents there are."""
    layout = SequenceLayout((3,) * 300, 1)
    flow = flow_of(layout, 0)
    Counted.looks = 0
    with patch.object(
        segments, "flow_of", lambda *_, **__: flow._replace(fragments=Counted(flow.fragments))
    ):
        plan_of.__wrapped__(
            layout, 0, torch.device("cpu"),
            reverse=False, with_initial=False, with_final=result, length=64,
        )  # fmt: skip
    assert 300 <= Counted.looks <= 4 * 300
