"""How many of our files a warm call enters, forward and backward: what a reader must open.

Files of kernels do not count, which only the interpreter enters, nor the small helpers that all
packages share. The numbers go down, never up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch

from lasp import SequenceLayout, decay_rates, lightning_attention
from moe_parallel import ExpertParallelMoE, MoEConfig
from ring import ring_attention

ROOT = Path(__file__).parents[1]
LAYOUT, RATES = SequenceLayout((5, 3), num_ranks=1, order="contiguous"), decay_rates(2, 0, 1)
PACKAGES = tuple(str(ROOT / name) + "/" for name in ("lasp", "ring", "moe_parallel"))


def files_entered(call: Callable[[], torch.Tensor]) -> set[str]:
    """Files of the packages whose functions a second call and its backward run."""
    call().sum().backward()
    entered: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        helper = "/_core/" in file or file.endswith("_kernel.py")
        if event == "call" and file.startswith(PACKAGES) and not helper:
            entered.add(file[len(str(ROOT)) + 1 :])

    # The backward of operators on the CPU runs in this thread.
    sys.setprofile(note)
    try:
        call().sum().backward()
    finally:
        sys.setprofile(None)
    return entered


def lightning(impl: str) -> torch.Tensor:
    q, k, v = (torch.ones(8, 2, 16, requires_grad=True) for _ in range(3))
    return lightning_attention(q, k, v, RATES, layout=LAYOUT, impl=impl).output


def ring(_: str) -> torch.Tensor:
    q, k, v = (torch.ones(8, 2, 16, requires_grad=True) for _ in range(3))
    return ring_attention(q, k, v, layout=LAYOUT).output


class Experts:
    """A layer for each implementation."""

    def __init__(self) -> None:
        self.layers: dict[str, ExpertParallelMoE] = {}

    def __call__(self, impl: str) -> torch.Tensor:
        if impl not in self.layers:
            config = MoEConfig(hidden_size=16, ffn_size=16, num_experts=4, top_k=2, impl=impl)
            self.layers[impl] = ExpertParallelMoE(config, seed=0)
        return self.layers[impl](torch.ones(8, 16, requires_grad=True)).output


@pytest.mark.parametrize(
    ("call", "impl", "most"),
    [
        (lightning, "eager", 8),
        (lightning, "triton", 8),
        (ring, "auto", 9),
        (Experts(), "eager", 12),
        (Experts(), "triton", 13),
    ],
)
def test_a_warm_call_enters_few_files(
    call: Callable[[str], torch.Tensor], impl: str, most: int
) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    entered = files_entered(lambda: call(impl))
    assert len(entered) <= most, sorted(entered)
