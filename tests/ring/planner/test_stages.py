"""Every route and number of stages gives the attention of one rank, in the same bits every time."""

from __future__ import annotations

import math
import time
from itertools import pairwise, starmap
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention
from ring.planner.ranges import RowRange, union
from ring.planner.stages import RULE, StageRule, around_stages
from ring.planner.window import CAUSAL
from tests.ranks import run_on_ranks
from tests.ring.cases import (
    HEADS,
    NAMES,
    NOTHING_HIDES,
    ORDERS,
    PACKS,
    RULES,
    WHOLE,
    assert_all_equal,
    assert_all_within_budget,
    forward_backward,
    on_world,
    oracle,
    planned_by,
    random_tensors,
    unshard_all,
)


def cases_on_world(cases) -> list[list[Tensor]]:
    results = []
    for tensors, layout, rule, kwargs in cases:
        with planned_by(rule):
            results.append(on_world(tensors, layout, **kwargs))
    return results


def on_ranks(cases, num_ranks: int, backend: str = "gloo") -> list[list[Tensor]]:
    """Results of the whole pack, for each case."""
    by_rank = run_on_ranks(cases_on_world, num_ranks, cases, backend=backend)
    return [unshard_all(case[1], some) for case, *some in zip(cases, *by_rank)]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_output_and_gradients_in_float64(num_ranks: int, order, causal: bool) -> None:
    """Every pack by three rules; over orders and masks it meets all of them."""
    cases = []
    for index, lengths in enumerate(PACKS):
        tensors = random_tensors(sum(lengths), *HEADS[index % len(HEADS)], 4, torch.float64)
        layout = SequenceLayout(lengths, num_ranks, order)
        first = (index + ORDERS.index(order) + len(ORDERS) * causal) % 4
        cases += [(tensors, layout, rule, {"causal": causal}) for rule in RULES[first::4]]
        cases.append((tensors, layout, WHOLE, {"causal": causal, "block": "eager"}))  # in place
    for (tensors, layout, _, _), actual in zip(cases, on_ranks(cases, num_ranks)):
        assert_all_equal(actual, oracle(tensors, layout.document_lengths, causal))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [True, False])
def test_lower_precision_within_the_error_of_one_eager_rank(dtype, causal: bool) -> None:
    lengths = (90, 1, 37)
    tensors = random_tensors(128, 4, 2, 16, dtype)
    one = SequenceLayout(lengths, 1)
    honest = forward_backward(tensors, layout=one, causal=causal, block="eager")
    layout = SequenceLayout(lengths, 4, "zigzag")
    cases = [(tensors, layout, rule, {"causal": causal}) for rule in RULES]
    for actual in on_ranks(cases, 4):
        assert_all_within_budget(actual, oracle(tensors, lengths, causal), honest, dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bits_are_the_same_in_two_runs(rule: StageRule, dtype) -> None:
    tensors = random_tensors(120, 4, 2, 8, dtype)
    layout = SequenceLayout((100, 20), 4, "fold")
    options = {"block": "eager"} if rule is WHOLE else {}
    first, second = on_ranks([(tensors, layout, rule, options)] * 2, 4)
    for name, a, b in zip(NAMES, first, second, strict=True):
        assert torch.equal(a, b), name


def late_on_world(cases) -> list[list[Tensor]]:
    """Each rank starts its exchanges late, another one each time."""
    calls, original = [], dist.all_to_all_single

    def late(*args, **kwargs):
        calls.append(1)
        time.sleep(0.004 * ((dist.get_rank() + len(calls)) % 3))
        return original(*args, **kwargs)

    with patch.object(dist, "all_to_all_single", late):
        return cases_on_world(cases)


def test_late_ranks_change_nothing() -> None:
    tensors = random_tensors(120, 4, 2, 8, torch.float32)
    layout = SequenceLayout((100, 20), 4, "zigzag")
    cases = [(tensors, layout, rule, {"causal": False}) for rule in RULES]
    in_time = run_on_ranks(cases_on_world, 4, cases)
    late = run_on_ranks(late_on_world, 4, cases)
    for a, b in zip(tree_leaves(in_time), tree_leaves(late), strict=True):
        assert torch.equal(a, b)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [True, False])
def test_float64_over_gpus(order, causal: bool) -> None:
    lengths = (40, 1, 0, 70, 12)
    tensors = random_tensors(sum(lengths), 6, 2, 5, torch.float64)
    layout = SequenceLayout(lengths, 2, order)
    cases = [(tensors, layout, rule, {"causal": causal}) for rule in RULES]
    for actual in on_ranks(cases, 2, "nccl"):
        assert_all_equal(actual, oracle(tensors, lengths, causal))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ["zigzag", "fold"])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_of_cudnn_over_gpus(order, causal: bool) -> None:
    """Long enough for dense tiles, squares and what is left of them, in several stages."""
    lengths = (9000, 1, 300, 3000)
    tensors = random_tensors(sum(lengths), 2, 1, 64, torch.bfloat16)
    one = SequenceLayout(lengths, 1)
    honest, expected = (
        forward_backward(x, layout=one, device="cuda", causal=causal, block="eager")
        for x in (tensors, [x.double() for x in tensors])
    )
    layout = SequenceLayout(lengths, 2, order)
    rule = StageRule(3, 1000, NOTHING_HIDES, chain_gain=math.inf)
    cases = [(tensors, layout, rule, {"causal": causal, "block": "cudnn"})]
    (actual,) = on_ranks(cases, 2, "nccl")
    assert_all_within_budget(actual, expected, honest, torch.bfloat16)


def syncs_on_world(tensors, layout: SequenceLayout, rule: StageRule) -> None:
    """Warm, then once more with any wait of the host for the device an error."""
    rank = dist.get_rank()
    *qkv, doutput = (layout.shard(x, rank).to("cuda") for x in tensors)
    qkv = [x.detach().requires_grad_() for x in qkv]
    kwargs = {"layout": layout, "cp_group": dist.group.WORLD}
    with planned_by(rule):
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                torch.autograd.grad(ring_attention(*qkv, **kwargs).output, qkv, doutput)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.multi_gpu
def test_the_host_never_waits() -> None:
    lengths = (9000, 1, 300, 3000)
    tensors = random_tensors(sum(lengths), 4, 2, 64, torch.bfloat16)
    layout, rule = (
        SequenceLayout(lengths, 2, "fold"),
        StageRule(3, 1000, NOTHING_HIDES, chain_gain=math.inf),
    )
    run_on_ranks(syncs_on_world, 2, tensors, layout, rule, backend="nccl")


def test_rows_before_the_stages_hide_the_first_transfer() -> None:
    """Work of whole fragments: as much as the transfer takes, and a third of all at most."""
    borders = (0, 4000, 8000, 12000, 20000)
    fragments = list(starmap(RowRange, pairwise(borders)))
    rule = RULE._replace(pairs_per_token=1000, row_pairs=0, call_pairs=10**6)
    triangle = 4000 * 4001 // 2  # pairs of each of the first three fragments, of 56 million

    def before(moved: int, **changes: int) -> tuple[RowRange, ...]:
        first, rest = around_stages(fragments, CAUSAL, moved, rule._replace(**changes))
        assert union((*first, *rest)) == (RowRange(0, 20000),)
        return first

    assert before(triangle // 1000) == (RowRange(0, 4000),)
    assert before(10**6) == (RowRange(0, 8000),)  # 18.7 million are a third
    assert before(1024) == ()  # no fragment is as short
    assert before(10**6, call_pairs=20 * 10**6) == ()  # too little for a call
    assert before(10**7, row_pairs=10**6) == (RowRange(0, 8000),)  # by rows: 6667
    assert around_stages(fragments[3:], CAUSAL, 10**6, rule)[0] == ()
    apart = [fragments[0], *fragments[2:]]
    assert around_stages(apart, CAUSAL, triangle // 1000, rule)[1] == (RowRange(8000, 20000),)
