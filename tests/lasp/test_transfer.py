"""What is remembered on a device is not made while a CUDA graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lasp.call import _decay
from lasp.decay import rates_by_value
from lasp.exchange.start import _index
from lasp.layout import SequenceLayout
from lasp.segments import parts_of, plan_of
from lasp.transfer import to_device

GPU = torch.device("cuda", 0)
CALLS: dict[str, Callable[[], Any]] = {
    "segments": lambda: plan_of(
        SequenceLayout((3,), 1), 0, GPU, reverse=False, given=False, result=False, length=64
    ),
    "parts": lambda: parts_of((64,), (64,), 64, GPU),
    "transitions": lambda: _decay((0.125,), 3, 0.0, torch.float32, GPU),
    "heads": lambda: _index((0, 2), GPU),
    "rates": lambda: rates_by_value((0.0625,), GPU, torch.float32),
}


@pytest.mark.parametrize("name", CALLS)
def test_first_use_inside_a_capture_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="once before capturing"):
        CALLS[name]()


def test_the_cpu_takes_it_as_it_is() -> None:
    x = torch.ones(2)
    assert to_device(x, torch.device("cpu")) is x


@pytest.mark.gpu
def test_a_gpu_gets_it_in_one_piece_whatever_its_size() -> None:
    for count in (0, 3):
        assert torch.equal(to_device(torch.arange(count), GPU).cpu(), torch.arange(count))
