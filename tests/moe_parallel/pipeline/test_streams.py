"""Groups on two streams in turn."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from moe_parallel import MoEConfig
from moe_parallel.experts import experts
from moe_parallel.experts.swiglu import swiglu
from moe_parallel.pipeline.schedule import steps
from moe_parallel.pipeline.streams import TurnStreams
from tests.moe_parallel.layers import build


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("gathers", [False, True])
def test_every_stage_of_every_group_comes_once_after_what_it_takes(
    count: int, gathers: bool
) -> None:
    for wgrad in (False, True):
        found = steps(count, gathers=gathers, wgrad=wgrad)
        stages = ["dispatch", *["gather"] * gathers, "experts", "combine", *["wgrad"] * wgrad]
        assert len(found) == len(set(found)) == count * len(stages)
        for g in range(count):
            places = [found.index((stage, g)) for stage in stages]
            order = places if not wgrad else [*places[:-2], min(places[-2:]), max(places[-2:])]
            assert order == sorted(order)
        for stage in stages:
            assert [g for name, g in found if name == stage] == list(range(count))


def test_there_is_nothing_to_turn_on_a_cpu() -> None:
    with TurnStreams(torch.device("cpu"), 3) as streams:
        assert [streams.turn(g) for g in range(3)] == [None] * 3


CASES = {
    "loop": {"gemm": "loop"},
    "grouped": {"gemm": "grouped"},
    "padded": {"gemm": "grouped", "capacity_factor": 1.0, "pad_to_capacity": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_the_streams(case: str) -> None:
    x = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for groups in (1, 4, 8):
        config = MoEConfig(256, 512, 8, 2, overlap_groups=groups, **CASES[case])
        layer = build(config, torch.bfloat16, False, device="cuda")
        for _ in range(3):  # memory of one call serves the next
            leaf = x.clone().requires_grad_()
            layer.zero_grad()
            output = layer(leaf).output
            output.square().sum().backward()
            grads = [p.grad.clone() for p in layer.parameters()]
            results.append([output.detach(), leaf.grad, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.gpu
def test_a_call_that_raises_leaves_the_stream_as_it_was() -> None:
    layer = build(MoEConfig(64, 128, 8, 2, overlap_groups=4), torch.bfloat16, False, device="cuda")
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    expected, before = layer(x).output, torch.cuda.current_stream()
    later = mock.Mock(side_effect=[swiglu, MemoryError])  # of the second group
    fails = mock.patch.object(experts, "swiglu", lambda *args: later()(*args))
    with fails, pytest.raises(MemoryError):
        layer(x)
    assert torch.cuda.current_stream() == before
    assert torch.equal(layer(x).output, expected)


@pytest.mark.multi_gpu
def test_the_current_device_stays_current() -> None:
    layer = build(
        MoEConfig(64, 128, 8, 2, overlap_groups=3), torch.bfloat16, False, device="cuda:1"
    )
    layer(torch.randn(64, 64, device="cuda:1", dtype=torch.bfloat16))
    assert torch.cuda.current_device() == 0
