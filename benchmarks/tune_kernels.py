"""Which block sizes should ``lasp.lightning.triton.tuning`` name for this GPU?

Times the output kernel over head dims and ways to cut it, and prints a table: the best first, the
one in ``tuning`` marked. What it does not fit (shared memory, registers) is left out. Then it times
one token of a state against one token of an output, ``tuning.STATE_COST``. Nothing is written:
numbers go into ``tuning`` by hand, with a run of ``benchmarks.lightning_kernels`` before and after.

Run: python -m benchmarks.tune_kernels --dims 128 128
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.harness import copy_bytes_per_s, measure_ms
from lasp import SequenceLayout, decay_rates
from lasp.lightning.decay import rates_by_value
from lasp.lightning.triton import chunk_state as launch
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan import EdgeStates, chunk_scan
from lasp.lightning.triton.segments import Plan, plan_of, reaches_of
from lasp.lightning.triton.tuning import Blocks

HEADS, TOKENS, LAYERS = 16, 131072, 80


def candidates(dim_out: int) -> Iterator[Blocks]:
    """Ways to cut the output kernel for operands of two bytes."""
    for chunk, columns, num_warps, num_stages in product(
        (64, 128), (64, 128), (4, 8), (1, 2, 3, 4)
    ):
        if columns <= tuning.padded(dim_out):
            yield Blocks(chunk, columns, num_warps, num_stages)


def time_all(
    run: Callable[[], Tensor], cuts: Iterator[Blocks], time_ms: Callable[..., float]
) -> list[tuple[float, Blocks]]:
    """Times of ``run`` under each cut whose result is that of the cut in ``tuning``, sorted."""
    expected = run().float()
    times = []
    for blocks in cuts:
        with patch.object(tuning, "output_blocks", lambda *_, blocks=blocks: blocks):
            try:
                error = (run().float() - expected).norm() / expected.norm()
                if error < 1e-2:
                    times.append((time_ms(run), blocks))
            except OutOfResources:
                continue
    return sorted(times)


class Problem:
    """Tensors of one shape and what the kernels must know of them."""

    def __init__(self, dim_in: int, dim_out: int, layer_index: int) -> None:
        """``layer_index`` of 80: 0 forgets fastest."""
        self.query, self.key = (self._randn(dim_in) for _ in range(2))
        self.value = self._randn(dim_out)
        rates = tuple(decay_rates(HEADS, layer_index, LAYERS).tolist())
        self.rates = rates_by_value(rates, self.query.device, torch.float32)
        self.reaches = reaches_of(rates, 2.0**-32)

    @staticmethod
    def _randn(dim: int) -> Tensor:
        return torch.randn(TOKENS, HEADS, dim, device="cuda", dtype=torch.bfloat16)

    def plan(self, length: int) -> Plan:
        """Of one document in segments of so many tokens."""
        layout = SequenceLayout((TOKENS,), 1)
        return plan_of(
            layout,
            0,
            self.query.device,
            reverse=False,
            with_initial=False,
            with_final=False,
            length=length,
        )

    def states(self, plan: Plan) -> launch.States:
        """Chunk state and state passing."""
        return launch.chunk_state(
            self.key, self.value, self.rates, plan, self.reaches, initial_state=None, scale=1.0
        )

    def output(self, plan: Plan, states: launch.States) -> Tensor:
        """Chunk scan."""
        edges = EdgeStates(states.entering, None, None)
        return chunk_scan(self.query, self.key, self.value, self.rates, plan, edges, scale=1.0)


def print_blocks(dim_in: int, dim_out: int, console: Console) -> None:
    """The table for one pair of head dims."""
    problem = Problem(dim_in, dim_out, layer_index=0)
    length = launch.segment_length(problem.query, problem.value, problem.reaches)
    plan = problem.plan(length)
    states = problem.states(plan)
    times = time_all(
        lambda: problem.output(plan, states), candidates(dim_out), lambda run: measure_ms(run)[1]
    )
    elements = 2 * problem.query.numel() + 2 * problem.value.numel()
    floor_ms = 2 * elements / copy_bytes_per_s() * 1e3
    current = tuning.output_blocks(dim_in, dim_out, torch.bfloat16)
    table = Table("chunk", "columns", "num_warps", "num_stages", "ms", "x floor", "")
    for ms, blocks in times[:12]:
        marked = "tuning" if blocks[:4] == current[:4] else ""
        table.add_row(*map(str, blocks[:4]), f"{ms:.3f}", f"{ms / floor_ms:.2f}", marked)
    console.print(f"output kernel, query and key {dim_in}, value and output {dim_out}", table)


def print_state_cost(console: Console) -> None:
    """What one token of a state costs, in tokens of an output program."""
    problem = Problem(128, 128, layer_index=LAYERS - 2)  # all tokens of a segment count
    plan = problem.plan(TOKENS // 8 // 64 * 64)
    states = problem.states(plan)
    output_ms = measure_ms(lambda: problem.output(plan, states))[1]
    states_ms = measure_ms(lambda: problem.states(plan))[1]
    counted = sum(plan.state_lengths)
    cost = states_ms / counted / (output_ms / TOKENS)
    console.print(f"STATE_COST {cost:.2f} (in tuning: {tuning.STATE_COST})")


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs=2, action="append", metavar=("IN", "OUT"))
    options = parser.parse_args()
    console = Console()
    for dim_in, dim_out in options.dims or [(64, 64), (128, 128), (256, 256)]:
        print_blocks(dim_in, dim_out, console)
    print_state_cost(console)


if __name__ == "__main__":
    main()
