"""The benchmark runs, at sizes that say nothing about speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from benchmarks import moe_cases, moe_liger, moe_megatron, moe_overlap, report
from benchmarks.harness import Machine
from benchmarks.timing import Timed
from benchmarks.trace_parts import Span
from tests.ranks import run_on_ranks

CASE = moe_overlap.Case(32, hidden=24, ffn=16, experts=8)


def rows_on_rank(case: moe_overlap.Case) -> list[dict[str, Any]]:
    machine = Machine("cpu", torch.float32, 2)
    with moe_overlap.groups_of(case) as groups:
        differences = moe_overlap.check(case, groups, machine)
        assert all(difference < 1e-5 for difference in differences.values())
        layer = moe_cases.build(case, groups, machine, on_device=True)
        rows = list(moe_overlap.measure(case, layer, groups, machine))
    assert set(differences) == {row["impl"] for row in rows if "Megatron" in row["impl"]}
    return rows


@pytest.mark.parametrize(
    "case", [CASE._replace(ep=2), CASE._replace(etp=2), CASE._replace(ep=2, etp=2)]
)
def test_every_variant_is_right_and_measured(case: moe_overlap.Case) -> None:
    rows = run_on_ranks(rows_on_rank, case.ep * case.etp, case)[0]
    metrics: dict[str, set[str]] = {}
    for row in rows:
        metrics.setdefault(row["impl"], set()).add(row["metric"])
    times = {"forward_ms", "both_ms"}
    for part in ("nothing sent", "only sent", "bare products"):
        assert metrics.pop(part) == times
    megatron = [name for name in metrics if name.startswith("Megatron-Core")]
    assert len(megatron) == (moe_megatron.obstacle() is None)
    assert all(metrics.pop(name) == times for name in megatron)
    bounds = {row["impl"] for row in rows if row["bound"] is None and row["metric"] in times}
    assert bounds == {"only sent", "bare products"}
    groups = sorted({1, 2, 8 // case.ep // 2, 8 // case.ep})
    assert metrics.pop("lasp, by the rule") == times | {"forward_saved_ms", "both_saved_ms"}
    if case.etp == 1:
        assert metrics.pop("lasp, tokens once") == times
    assert set(metrics) == {f"lasp {g} groups" for g in groups} | {"2 token groups"}
    exposed = {"forward_exposed", "both_exposed"}
    assert all(found == times | exposed for found in metrics.values())


def test_another_router_is_right_and_named() -> None:
    case = CASE._replace(experts=32, hidden=64, top_k=4, ep=2, router="ling")
    rows = run_on_ranks(rows_on_rank, 2, case)[0]
    assert {row["case"]["router"] for row in rows} == {"ling"}
    assert "2 token groups" not in {row["impl"] for row in rows}
    assert "router" not in CASE.facts


def sent_on_rank(case: moe_overlap.Case) -> list[int]:
    """How many all-to-alls each kind of call starts."""
    machine, counts = Machine("cpu", torch.float32, 1), []
    with moe_overlap.groups_of(case) as groups:
        layer = moe_overlap.build(case, groups, machine)
        x, grad = moe_overlap.inputs(case, machine)
        every = moe_cases.ways(layer, machine)
        timed = moe_overlap.calls(layer, every, x, grad, backward=True)
        exchange = dist.all_to_all_single
        for name in ("lasp 1 groups", "nothing sent", "only sent"):
            with patch.object(dist, "all_to_all_single", wraps=exchange) as counting:
                with timed[name].in_force:
                    timed[name].call()
                counts.append(counting.call_count)
    return counts


def overlapped_on_rank() -> float:
    """The trace begins with a barrier; the second rank hides less."""
    stop = 6.0 - dist.get_rank()

    def kernels(call: Any) -> list[Span]:
        call()
        spans = [Span("ncclDevKernel_AllGather", 3.0, 7.0), Span("gemm", 4.0, stop)]
        return [*spans, Span("ncclDevKernel_AllReduce", 0.0, 2.0), Span("Memcpy DtoH", 8.0, 9.0)]

    calls: list[None] = []
    timed = Timed(lambda: calls.append(None))
    with patch.object(moe_overlap, "kernels", kernels), patch.object(torch.cuda, "synchronize"):
        share = moe_overlap.overlapped(timed, moe_overlap.TRAVELS[1], Machine("cpu"))
    assert len(calls) == moe_overlap.TRACED
    return share


def test_the_overlap_of_a_trace_is_that_of_the_rank_that_hides_least() -> None:
    assert run_on_ranks(overlapped_on_rank, 2) == [0.25, 0.25]


def test_meshes_may_be_named() -> None:
    options = moe_overlap.Options(commit="c", tokens=(64,), hidden=8, ffn=8, experts=4)
    meshes = [(case.ep, case.etp, case.max_ctas) for case in moe_overlap.cases(options, 4)]
    assert meshes == [(4, 1, 0), (4, 1, 2), (1, 4, 0), (2, 2, 0), (2, 2, 2)]
    options.meshes = ("1x2",)
    assert [(case.ep, case.etp) for case in moe_overlap.cases(options, 2)] == [(1, 2)]


def products_on_rank(case: moe_overlap.Case) -> None:
    machine = Machine("cpu", torch.float32, 1)
    with moe_overlap.groups_of(case) as groups:
        layer = moe_overlap.build(case, groups, machine)
        x, grad = moe_overlap.inputs(case, machine)
        timed = moe_overlap.calls(layer, moe_cases.ways(layer, machine), x, grad, backward=True)
        shapes: dict[str, list[Any]] = {}
        for name in ("lasp 1 groups", "bare products"):
            with patch.object(torch, "mm", wraps=torch.mm) as counting:
                timed[name].call()
            shapes[name] = sorted(
                [tuple(x.shape) for x in call.args] for call in counting.call_args_list
            )
    assert shapes["lasp 1 groups"] == shapes["bare products"]
    assert len(shapes["bare products"]) == 6 * layer.experts.num_local


@pytest.mark.parametrize("case", [CASE._replace(ep=2), CASE._replace(etp=2)])
def test_bare_products_are_those_of_the_layer(case: moe_overlap.Case) -> None:
    run_on_ranks(products_on_rank, 2, case)


def test_what_is_left_out_is_what_is_sent() -> None:
    case = CASE._replace(ep=2, etp=2)
    assert run_on_ranks(sent_on_rank, 4, case) == [[8, 0, 8]] * 4


def test_planted_tokens_choose_all_experts_alike() -> None:
    run_on_ranks(balanced_on_rank, 2, CASE._replace(ep=2))


def balanced_on_rank(case: moe_overlap.Case) -> None:
    machine = Machine("cpu", torch.bfloat16, 1)
    with moe_overlap.groups_of(case) as groups:
        layer = moe_overlap.build(case, groups, machine)
        stats = layer(moe_overlap.inputs(case, machine)[0]).stats
    assert len(set(stats.assigned.tolist())) == 1


@pytest.mark.parametrize("peer", [moe_megatron, moe_liger])
def test_a_peer_is_left_out_where_it_is_missing(peer: Any) -> None:
    missing = patch("importlib.import_module", side_effect=ModuleNotFoundError("nothing here"))
    with missing:
        assert peer.obstacle.__wrapped__() == "nothing here"


def test_rows_make_a_table() -> None:
    facts = {"device": "GPU", "num_devices": 2, "nccl": "2", "torch": "2", "triton": "3"}
    facts |= {"driver": "1", "date": "2026-01-01", "commit": "0" * 40, "command": "c"}
    rows = [row | facts for row in run_on_ranks(rows_on_rank, 2, CASE._replace(ep=2))[0]]
    text = report.table(rows)
    assert "| lasp 2 groups |" in text
    assert "Bounds: [1] bare products." in text


def test_the_page_says_what_the_rows_say() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "moe.md").read_text()
    assert report.rewrite(page, report.read_runs(root / report.RESULTS)) == page
    assert [place[1] for place in report.PLACE.findall(page)] == ["moe_overlap", "moe_host"]
