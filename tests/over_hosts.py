"""The tests of this folder on ranks that a launcher started: ``-m tests.over_hosts ARGUMENTS``.

Every rank runs pytest with the same arguments. ``run_on_ranks`` then runs its function on the rank
that calls it and gathers the results; tests of another number of ranks are skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lasp.launch import init_distributed
from tests import ranks


def run_on_ranks(
    fn: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    backend: str = "gloo",
    timeout_s: float = 0.0,
    **kwargs: Any,
) -> list[Any]:
    if num_ranks != dist.get_world_size():
        pytest.skip(f"a test of {num_ranks} ranks, not of {dist.get_world_size()}")
    results: list[Any] = [None] * num_ranks
    dist.all_gather_object(results, fn(*args, **kwargs))
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed("cpu", timeout=timedelta(seconds=120))
    ranks.run_on_ranks = run_on_ranks  # before a test imports it
    status = pytest.main([*sys.argv[1:], "-p", "no:cacheprovider", "-q", "-x"])
    dist.destroy_process_group()
    sys.exit(status)
