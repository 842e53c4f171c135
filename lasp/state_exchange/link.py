"""Measure the link between ranks, for ``exchange="auto"`` where it is none that the model knows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from math import inf
from typing import NamedTuple

import torch
import torch.distributed as dist

from lasp._core.checks import check_part, check_sizes
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange.choice import EXACT, ExchangeChoice
from lasp.state_exchange.cost import ExchangeTraffic, Link, StateSize, exchange_us, traffic_of
from lasp.state_exchange.start import start_exchange

# The model is linear in the reciprocal bandwidth and in its other numbers: a link for each alone,
# and last what half duplex adds to the first.
UNITS = (Link(0, 1, 0, 0), Link(0, inf, 1, 0), Link(1, inf, 0, 0), Link(0, inf, 0, 1))
HALF_DUPLEX = Link(0, 1, 0, 0, 1)
HEADS, DIM = (1, 4, 32), 64  # states of 16 KiB to half a MiB
BLOCKS = 4


class TimedExchange(NamedTuple):
    """How long an exchange took."""

    strategy: str
    traffic: ExchangeTraffic
    size: StateSize
    num_blocks: int
    us: float

    def model_us(self, over: Link) -> float:
        """The time that the cost model gives this exchange over a link, in us."""
        return exchange_us(self.strategy, self.traffic, self.size, over, self.num_blocks)


def measure_link(cp_group: dist.ProcessGroup, *, samples: int = 15) -> Link:
    """Time exchanges of small and large states over the group, and fit the cost model to them.

    For once, before the layers are built: ``exchange_over(measure_link(cp_group))`` is an exchange
    that they take. The numbers differ from run to run; the results of an exchange do not.

    Args:
        cp_group: ranks that are otherwise idle.
        samples: of each of twelve exchanges; a fast one of them counts.

    Returns:
        The same link on every rank.

    Communication: some tens of MB a rank, on the CPU with gloo, else on the current GPU.

    Raises:
        ValueError: for a group of one rank, and for no samples.
    """
    check_sizes(samples=samples)
    check_part("cp_group", cp_group, dist.ProcessGroup)
    num_ranks = cp_group.size()
    if num_ranks < 2:
        raise ValueError("cp_group must have two ranks or more, got one: a link is between ranks")
    flow = flow_of(SequenceLayout((num_ranks,), num_ranks), cp_group.rank())
    traffic = traffic_of(flow.steps, num_ranks, lambda length: True)
    on_gpu = dist.get_backend(cp_group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    found = []
    for heads in HEADS:
        states = torch.zeros(flow.num_slots, heads, DIM, DIM, device=device)
        passed = [torch.ones(1, 1, 1, device=device) for _ in flow.steps]
        for name, blocks in (*((name, 1) for name in EXACT), ("scan", BLOCKS)):
            choice = ExchangeChoice(name, tuple(range(heads)), blocks)
            times = []
            for _ in range(samples + 1):  # the first one warms up
                dist.all_reduce(torch.zeros(1, device=device), group=cp_group)
                if on_gpu:
                    torch.cuda.synchronize(device)
                begun = time.perf_counter()
                start_exchange((choice,), states, flow, (passed,), cp_group)()
                if on_gpu:
                    torch.cuda.synchronize(device)
                times.append(1e6 * (time.perf_counter() - begun))
            slowest = torch.tensor(times[1:], dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, group=cp_group)
            us = sorted(slowest.tolist())[samples // 4]
            found.append(TimedExchange(name, traffic, StateSize(heads, DIM, DIM), blocks, us))
    return fit_link(found)


def fit_link(timed: Sequence[TimedExchange]) -> Link:
    """The link of least squares of relative errors, none of whose numbers is negative.

    Where the exchanges do not tell two numbers apart, the first one of ``UNITS`` stands for both.
    """
    parts = [[t.model_us(unit) for unit in (*UNITS, HALF_DUPLEX)] for t in timed]
    shares = torch.tensor(parts, dtype=torch.float64)
    shares[:, -1] -= shares[:, 0]
    shares /= torch.tensor([[t.us] for t in timed], dtype=torch.float64)
    target = torch.ones(len(timed), 1, dtype=torch.float64)
    least, best = inf, torch.zeros(shares.shape[1], dtype=torch.float64)
    for count in range(1, len(best) + 1):
        for columns in combinations(range(len(best)), count):
            part = shares[:, columns]
            solution = torch.linalg.lstsq(part, target, driver="gelsd").solution
            error = (part @ solution - target).norm().item()
            if (solution >= 0).all() and error < 0.999 * least:
                least, best = error, torch.zeros_like(best)
                best[list(columns)] = solution.flatten()
    per_gb, launch, latency, rank, half = best.tolist()
    if per_gb == 0:  # states this small do not tell
        return Link(latency, inf, launch, rank)
    return Link(latency, 1 / per_gb, launch, rank, half / per_gb)
