"""The state exchange runs while the rank computes what does not need it; compilers leave it be."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from lasp import SequenceLayout, decay_rates, lightning_attention
from lasp.lightning import eager as ops
from lasp.state_exchange import strategies
from tests.ranks import run_on_ranks


class RecordedWork:
    """A collective's handle that says when it is waited for."""

    def __init__(self, work: Any, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        self._work.wait()


def events_of_one_call() -> tuple[list[str], list[str]]:
    """What happened in forward and backward, in order, on this rank."""
    events: list[str] = []
    gather, chunk_scan = strategies.all_gather_into, ops.chunk_scan

    def recorded_gather(*args: Any, **kwargs: Any) -> RecordedWork:
        assert kwargs["async_op"]
        events.append("start")
        return RecordedWork(gather(*args, **kwargs), events)

    def recorded_scan(*args: Any, **kwargs: Any) -> Any:
        events.append("compute")
        return chunk_scan(*args, **kwargs)

    layout = SequenceLayout((40,), dist.get_world_size())
    q, k, v = (torch.randn(20, 2, 4, requires_grad=True) for _ in range(3))
    with (
        mock.patch.object(strategies, "all_gather_into", recorded_gather),
        mock.patch.object(ops, "chunk_scan", recorded_scan),
    ):
        rates = decay_rates(2, 0, 2)
        output, _ = lightning_attention(
            q, k, v, rates, layout=layout, cp_group=dist.group.WORLD, exchange="all_gather",
            output_final_state=False,
        )  # fmt: skip
        forward = events.copy()
        events.clear()
        output.sum().backward()
    return forward, events


def test_local_compute_runs_under_the_exchange() -> None:
    for forward, backward in run_on_ranks(events_of_one_call, 2):
        assert forward == ["start", "compute", "wait"]
        assert backward == ["start", "compute", "compute", "compute", "wait"]  # dq, dk, dv
