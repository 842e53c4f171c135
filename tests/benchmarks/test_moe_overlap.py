"""The benchmark runs, at sizes that say nothing about speed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from benchmarks import moe_overlap
from benchmarks.lasp_ranks import Machine
from tests.ranks import run_on_ranks

CASE = moe_overlap.Case(32, hidden=24, ffn=16, experts=8)


def rows_on_rank(case: moe_overlap.Case) -> list[dict[str, Any]]:
    machine = Machine("cpu", "eager", torch.float32, 2)
    with moe_overlap.groups_of(case) as groups:
        moe_overlap.check(case, groups, machine)
        return list(moe_overlap.measure(case, groups, machine))


@pytest.mark.parametrize(
    "case", [CASE._replace(ep=2), CASE._replace(etp=2), CASE._replace(ep=2, etp=2)]
)
def test_every_variant_is_right_and_measured(case: moe_overlap.Case) -> None:
    rows = run_on_ranks(rows_on_rank, case.ep * case.etp, case)[0]
    metrics: dict[str, set[str]] = {}
    for row in rows:
        metrics.setdefault(row["impl"], set()).add(row["metric"])
    times = {"forward_ms", "both_ms"}
    assert metrics.pop("nothing sent") == metrics.pop("only sent") == times
    groups = sorted({1, 2, 8 // case.ep // 2, 8 // case.ep})
    assert set(metrics) == {f"lasp {g} groups" for g in groups} | {"2 token groups"}
    exposed = {"forward_exposed", "both_exposed"}
    assert all(found == times | exposed for found in metrics.values())


def sent_on_rank(case: moe_overlap.Case) -> list[int]:
    """How many all-to-alls each kind of call starts."""
    machine, counts = Machine("cpu", "eager", torch.float32, 1), []
    with moe_overlap.groups_of(case) as groups:
        layer = moe_overlap.build(case, groups, machine)
        x, grad = moe_overlap.inputs(case, machine)
        timed = moe_overlap.calls(layer, x, grad, machine, backward=True)
        exchange = dist.all_to_all_single
        for name in ("lasp 1 groups", "nothing sent", "only sent"):
            with patch.object(dist, "all_to_all_single", wraps=exchange) as counting:
                with timed[name].in_force:
                    timed[name].call()
                counts.append(counting.call_count)
    return counts


def test_what_is_left_out_is_what_is_sent() -> None:
    case = CASE._replace(ep=2, etp=2)
    assert run_on_ranks(sent_on_rank, 4, case) == [[8, 0, 8]] * 4


def test_planted_tokens_choose_all_experts_alike() -> None:
    run_on_ranks(balanced_on_rank, 2, CASE._replace(ep=2))


def balanced_on_rank(case: moe_overlap.Case) -> None:
    machine = Machine("cpu", "eager", torch.bfloat16, 1)
    with moe_overlap.groups_of(case) as groups:
        layer = moe_overlap.build(case, groups, machine)
        stats = layer(moe_overlap.inputs(case, machine)[0]).stats
    assert len(set(stats.assigned.tolist())) == 1
