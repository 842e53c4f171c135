"""A rank that dies or never comes: the others say so, in time."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceLayout, lightning_attention
from lasp.state_exchange import ExchangeError
from tests.ranks import run_on_ranks

TIMEOUT_S = 1.5


def wait_for_rank_2(exchange: str, calls_before: int) -> tuple[str, float]:
    """After so many calls rank 2 never comes; what the others raise, and after how long."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))

    def call() -> None:
        x, rates = torch.ones(10, 2, 4), torch.tensor([0.0, 0.1])
        lightning_attention(
            x, x, x, rates, layout=SequenceLayout((40,), 4), cp_group=group, exchange=exchange
        )

    for _ in range(calls_before):
        call()
    message, start = "", time.monotonic()
    if dist.get_rank() != 2:
        with pytest.raises(ExchangeError) as caught:
            call()
        message = str(caught.value)
    elapsed = time.monotonic() - start
    dist.barrier()
    return message, elapsed


@pytest.mark.parametrize(
    ("exchange", "calls_before", "what"),
    [
        ("scan", 0, "the comparison of first calls of lightning_attention"),
        ("all_gather", 1, "state exchange 'all_gather'"),
        ("scan", 1, "state exchange 'scan'"),
    ],
)
def test_a_rank_that_never_comes_is_named(exchange: str, calls_before: int, what: str) -> None:
    results = run_on_ranks(wait_for_rank_2, 4, exchange, calls_before)
    for rank, (message, elapsed) in enumerate(results):
        if rank != 2:
            assert message.startswith(f"{what} failed on rank {rank} of 4")
            assert "no word of ranks [2]" in message
            assert "Timed out" in message or "closed" in message
            assert elapsed < 10 * TIMEOUT_S  # the machine may be busy


PROGRAM = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from lasp import SequenceLayout, lightning_attention
rank, path = int(sys.argv[1]), sys.argv[2]
store = dist.FileStore(path, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
x = torch.ones(10, 1, 4)
for _ in range(2):
    lightning_attention(x, x, x, torch.ones(1), layout=SequenceLayout((20,), 2, "zigzag"),
                        cp_group=dist.group.WORLD, exchange="sliced")
    dist.barrier()
    if rank == 1:
        os._exit(3)
"""


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    """At once, not after the timeout, with a status that is not zero."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    _, error = ranks[0].communicate(timeout=120)
    assert ranks[1].wait(timeout=120) == 3
    assert ranks[0].returncode == 1
    assert (
        "ExchangeError: state exchange 'sliced' failed on rank 0 of 2: no word of ranks [1]"
        in error
    )
