"""Are experts dealt out to ranks, with their all-to-alls under products, faster than cut experts?

Plain tensor parallelism of experts holds a part of every expert on every rank: tokens of all ranks
are gathered, and partial sums scattered, before and after all products of a layer. Beside it stand
the same parts in groups of experts, whose communication is under the products of another group;
whole experts dealt out; and from 4 ranks on half of each, EP-ETP. All compute one layer with the
same tokens, routing planted so that each expert gets as many; calls take turns.

``x plain`` of a row is the time of plain tensor parallelism over it.

Run: torchrun --nproc-per-node 2 -m benchmarks.moe_against_tp --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import moe_overlap
from benchmarks.harness import Machine, Question, RankOptions, Row, answer, row
from benchmarks.moe_cases import Case, build, inputs
from benchmarks.timing import Timed, samples_ms
from moe_parallel import ExpertParallelMoE

PLAIN = "plain tensor parallelism"


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options; ``tokens`` of a rank."""

    tokens: tuple[int, ...] = (8192, 32768)
    hidden: int = 6144
    ffn: int = 9216
    experts: int = 32
    top_k: int = 2


def ways(ranks: int) -> dict[str, tuple[int, int, int | None]]:
    """By name EP, ETP, and groups of experts; None: by the rule of the dispatcher."""
    found: dict[str, tuple[int, int, int | None]] = {
        PLAIN: (1, ranks, 1),
        "cut experts in groups": (1, ranks, None),
        "experts dealt out": (ranks, 1, None),
    }
    if ranks >= 4:
        found["EP-ETP"] = (ranks // 2, 2, None)
    return found


def call_of(layer: ExpertParallelMoE, case: Case, machine: Machine) -> Callable[[], Any]:
    """Forward and backward of a layer."""
    x, grad = inputs(case, machine)
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x).output, leaves, grad, allow_unused=True)


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of every way, after a check of each layout."""
    ranks = dist.get_world_size()
    for tokens in options.tokens:
        with ExitStack() as stack:
            timed = {}
            for name, (ep, etp, num_groups) in ways(ranks).items():
                case = Case(
                    tokens, options.hidden, options.ffn, options.experts, options.top_k, ep, etp
                )
                groups = stack.enter_context(moe_overlap.groups_of(case))
                small = case._replace(tokens=8 * case.experts, hidden=64, ffn=128)
                moe_overlap.check(small, groups, machine)
                layer = build(case, groups, machine, on_device=True)
                layer.config = replace(layer.config, overlap_groups=num_groups)
                timed[name] = Timed(call_of(layer, case, machine))
            found = samples_ms(timed, machine)
        facts = {"tokens": tokens, "hidden": options.hidden, "ffn": options.ffn, "ranks": ranks}
        make = partial(row, "moe_against_tp", facts | {"experts": options.experts})
        medians = {name: times[len(times) // 2] for name, times in found.items()}
        for name, times in found.items():
            yield make(name, "both_ms", times, "ms")
            yield make(name, "x_plain", medians[PLAIN] / medians[name], "ratio")


QUESTION = Question("moe_against_tp", Options, rows)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
