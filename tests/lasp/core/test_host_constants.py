"""What is remembered on a device is not made while a CUDA graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lasp
from lasp._core.host_constants import to_device
from lasp.lightning.decay import rates_by_value
from lasp.lightning.op_context import _decay
from lasp.lightning.triton.chunk_state import parts_of
from lasp.lightning.triton.segments import plan_of
from lasp.sequence.layout import SequenceLayout
from lasp.state_exchange.start import _index
from moe_parallel import TokenOrder
from moe_parallel.experts import gemm
from moe_parallel.pipeline.groups import positions_on
from ring.blocks import cudnn, flash, interface
from ring.planner.window import CAUSAL

GPU = torch.device("cuda", 0)
ORDER = TokenOrder(segments=(((0, 2, 3), (5, 0, 1)),), rows_per_rank=(5,))
CALLS: dict[str, Callable[[], Any]] = {
    "segments": lambda: plan_of(
        SequenceLayout((3,), 1),
        0,
        GPU,
        reverse=False,
        with_initial=False,
        with_final=False,
        length=64,
    ),
    "parts": lambda: parts_of((64,), (64,), 64, GPU),
    "transitions": lambda: _decay((0.125,), 3, 0.0, torch.float32, GPU),
    "heads": lambda: _index((0, 2), GPU),
    "rates": lambda: rates_by_value((0.0625,), GPU, torch.float32),
    "cu_seqlens of a layout": lambda: SequenceLayout((3,), 1).cu_seqlens(0, GPU),
    "positions of a layout": lambda: SequenceLayout((3,), 1).position_ids(0, GPU),
    "states without dropout": lambda: flash._no_dropout(GPU)[0],
    "a seed without dropout": lambda: cudnn._no_dropout(GPU),
    "segments of a stretch": lambda: interface.segments_of((0, 4), GPU, CAUSAL).cu_seqlens,
    "segments of a rank's tokens": lambda: ORDER._segment_bounds(0, GPU),
    "segments by position": lambda: ORDER._segments_by_position(GPU),
    "tokens by position": lambda: ORDER._tokens_by_position(GPU),
    "ends of a grouped product": lambda: gemm._ends((1, 2), GPU, False),
    "positions of experts": lambda: positions_on(GPU, 4, 2, (range(1), range(1, 2))),
}


@pytest.mark.parametrize("name", CALLS)
def test_first_use_inside_a_capture_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="once before capturing"):
        CALLS[name]()


def test_there_is_no_other_way_to_a_device() -> None:
    root = Path(lasp.__file__).parents[1]
    sources = [p for name in ("lasp", "ring", "moe_parallel") for p in (root / name).rglob("*.py")]
    pinning = [p for p in sources if ".pin_memory()" in p.read_text()]
    assert [p.name for p in pinning] == ["host_constants.py"]


def test_the_cpu_takes_it_as_it_is() -> None:
    x = torch.ones(2)
    assert to_device(x, torch.device("cpu")) is x


@pytest.mark.gpu
def test_a_gpu_gets_it_in_one_piece_whatever_its_size() -> None:
    for count in (0, 3):
        assert torch.equal(to_device(torch.arange(count), GPU).cpu(), torch.arange(count))
