"""A trace with fake tensors, as planners of memory run one, leaves none where real calls look."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp.lightning.decay import rates_by_value
from lasp.lightning.op_context import _decay
from lasp.lightning.triton.chunk_state import parts_of
from lasp.sequence.layout import _LAYOUTS
from lasp.state_exchange.start import _index
from moe_parallel import TokenOrder
from moe_parallel.experts import gemm
from moe_parallel.pipeline.groups import positions_on
from ring import ring_attention
from ring.blocks import cudnn, flash, interface
from ring.planner.window import CAUSAL

CPU = torch.device("cpu")
LAYOUT = SequenceLayout((5, 2), 1)
ORDER = TokenOrder(segments=(((0, 2, 3), (5, 0, 1)),), rows_per_rank=(5,))
CONSTANTS: dict[str, Callable[[], Tensor]] = {
    "rates": lambda: rates_by_value((0.03125,), CPU, torch.float32),
    "transitions": lambda: _decay((0.03125,), 3, 0.0, torch.float32, CPU),
    "heads": lambda: _index((0, 3), CPU),
    "parts": lambda: parts_of((65,), (64,), 64, CPU).rows,
    "lengths of a layout": lambda: LAYOUT.lengths_tensor,
    "lengths of a remembered layout": lambda: (
        _LAYOUTS.get("five and seven", lambda: SequenceLayout((5, 7), 1, "fold")).lengths_tensor
    ),
    "positions of a layout": lambda: LAYOUT.position_ids(0),
    "states without dropout": lambda: flash._no_dropout(CPU)[0],
    "a seed without dropout": lambda: cudnn._no_dropout(CPU),
    "segments of a stretch": lambda: interface.segments_of((0, 5), CPU, CAUSAL).cu_seqlens,
    "segments of a rank's tokens": lambda: ORDER._segment_bounds(0, CPU),
    "positions of experts": lambda: positions_on(CPU, 4, 2, (range(1), range(1, 2))),
    "ends of a grouped product": lambda: gemm._ends((1, 3), CPU, False),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_trace_neither_leaves_nor_takes_what_is_remembered(name: str) -> None:
    constant = CONSTANTS[name]
    for _ in range(2):
        with FakeTensorMode():
            assert isinstance(constant(), FakeTensor)
        real = constant()
        assert not isinstance(real, FakeTensor)
        assert torch.equal(real, constant())


def test_a_layout_of_a_trace_is_good_for_real_calls() -> None:
    rates = decay_rates(2, 0, 1)

    def call(layout: SequenceLayout) -> list[Tensor]:
        q, k, v = (torch.ones(7, 2, 16) for _ in range(3))
        return [
            lightning_attention(q, k, v, rates, layout=layout).output,
            ring_attention(q, k, v, layout=layout).output,
        ]

    with FakeTensorMode():
        traced = SequenceLayout((5, 2), 1)
        shapes = [x.shape for x in call(traced)]
        call(LAYOUT)
    for layout in (traced, LAYOUT):
        assert [x.shape for x in call(layout)] == shapes
