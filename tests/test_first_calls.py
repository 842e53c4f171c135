"""Ranks that call an operator or a layer differently learn it in the first call, all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from lasp import LightningAttention, SequenceLayout, decay_rates, lightning_attention
from lasp._core.consistency import check_same_calls
from moe_parallel import (
    ExpertGroups,
    ExpertParallelMoE,
    MoEConfig,
    RouterConfig,
    TokenOrder,
    TokenSequences,
)
from ring import RingAttention, ring_attention, ring_latent_attention
from tests.ranks import run_on_ranks
from tests.test_consistency import on_rank

LAYOUT = SequenceLayout((11, 5), num_ranks=2, order="contiguous")
ROWS = LAYOUT.num_local_tokens


def autocast_on_rank_1() -> Any:
    return on_rank(nullcontext(), torch.autocast("cpu", torch.bfloat16))


def ring(group: dist.ProcessGroup, **changed: Any) -> None:
    heads, dtype = changed.pop("heads", 2), changed.pop("dtype", torch.float32)
    q, k, v = (torch.ones(ROWS, h, 8, dtype=dtype) for h in (2, heads, heads))
    ring_attention(q, k, v, **{"layout": LAYOUT, "cp_group": group, **changed})


def ring_module(group: dist.ProcessGroup) -> None:
    module = RingAttention(16, 2, 1, 8, rotary_dim=8)
    with autocast_on_rank_1():
        module(torch.ones(ROWS, 16), layout=LAYOUT, cp_group=group)


def lightning(group: dist.ProcessGroup, impl: str = "eager", **changed: Any) -> None:
    rates, dtype = decay_rates(2, changed.pop("layer", 0), 2), changed.pop("dtype", torch.float32)
    q, k, v = (torch.ones(ROWS, 2, 16, dtype=dtype) for _ in range(3))
    settings = {"layout": LAYOUT, "cp_group": group, "impl": impl, **changed}
    lightning_attention(q, k, v, rates, **settings)


def lightning_by_either(group: dist.ProcessGroup) -> None:
    """Only who computes differs, and how equal numbers are written."""
    settings = on_rank({"scale": 1, "state_eps": 0}, {"impl": "triton", "state_eps": 0.0})
    lightning(group, **settings)


def lightning_module(group: dist.ProcessGroup) -> None:
    module = LightningAttention(16, 2, 8, 0, 2)
    with autocast_on_rank_1():
        module(torch.ones(ROWS, 16), layout=LAYOUT, cp_group=group)


def experts(group: dist.ProcessGroup, **changed: Any) -> None:
    given, dtype = changed.pop("given", False), changed.pop("dtype", torch.float32)
    sequences = changed.pop("sequences", None)
    autocast = autocast_on_rank_1() if changed.pop("autocast", False) else nullcontext()
    config = MoEConfig(16, 8, 4, changed.pop("top_k", 2), **changed)
    layer = ExpertParallelMoE(config, groups=ExpertGroups(token=group, ep=group))
    order = TokenOrder.contiguous([ROWS, ROWS]) if given else None
    with autocast:
        layer(torch.ones(ROWS, 16, dtype=dtype), token_order=order, sequences=sequences)


def sequence_loss(group: dist.ProcessGroup, *nums: int | None) -> None:
    """An expert layer whose ranks say that there are so many sequences, or nothing."""
    num, router = on_rank(*nums), RouterConfig("softmax", sequence_loss_coefficient=0.1)
    numbers = torch.zeros(ROWS, dtype=torch.int64)
    sequences = None if num is None else TokenSequences(numbers, num)
    experts(group, sequences=sequences, router=router)


BOTH_DTYPES = (torch.float32, torch.bfloat16)
DTYPES = "dtype torch.float32 on ranks [0], torch.bfloat16 on ranks [1]"
CALLS: dict[str, tuple[Callable[[dist.ProcessGroup], None], str]] = {
    "ring": (lambda g: ring(g, dtype=on_rank(*BOTH_DTYPES)), f"ring_attention.*{DTYPES}"),
    "ring: autocast": (ring_module, f"ring_attention.*{DTYPES}"),
    "ring: heads": (lambda g: ring(g, heads=on_rank(2, 1)), "[8, 2, 8] on ranks [0]"),
    "ring: mask": (lambda g: ring(g, causal=on_rank(True, False)), "causal True on ranks [0]"),
    "ring: window": (lambda g: ring(g, window=(on_rank(2, 3), 0)), "window [2, 0] on ranks [0]"),
    "ring: sinks": (
        lambda g: ring(g, sinks=on_rank(None, torch.zeros(2))),
        "sinks None on ranks [0], torch.float32 on ranks [1]",
    ),
    "ring: latent": (
        lambda g: ring_latent_attention(
            torch.ones(ROWS, 2, 6),
            torch.ones(ROWS, 5),
            torch.ones(2, on_rank(6, 8), 3),
            layout=LAYOUT,
            cp_group=g,
        ),
        "ring_latent_attention.*weight [2, 6, 3] on ranks [0]",
    ),
    "ring: layout": (
        lambda g: ring(g, layout=on_rank(LAYOUT, SequenceLayout((5, 11), 2))),
        "layout 2 documents of 16 tokens over 2 ranks, order contiguous",
    ),
    "ring: no document cut": (
        lambda g: ring(g, layout=SequenceLayout((8, 8), 2), dtype=on_rank(*BOTH_DTYPES)),
        DTYPES,
    ),
    "lightning": (lambda g: lightning(g, dtype=on_rank(*BOTH_DTYPES)), DTYPES),
    "lightning: triton": (lambda g: lightning(g, "triton", dtype=on_rank(*BOTH_DTYPES)), DTYPES),
    "lightning: autocast": (lightning_module, f"lightning_attention.*{DTYPES}"),
    "lightning: rates": (lambda g: lightning(g, layer=on_rank(0, 1)), "rates"),
    "lightning: exchange": (
        lambda g: lightning(g, exchange=on_rank("scan", "all_gather")),
        "exchange scan on ranks [0], all_gather on ranks [1]",
    ),
    "lightning: eager and triton": (lightning_by_either, "nothing"),
    "lightning and ring": (
        lambda g: on_rank(lightning, ring)(g),
        "operator lightning_attention on ranks [0], ring_attention on ranks [1]",
    ),
    "experts: autocast": (lambda g: experts(g, autocast=True), f"ExpertParallelMoE.*{DTYPES}"),
    "experts: tokens": (lambda g: experts(g, dtype=on_rank(*BOTH_DTYPES)), DTYPES),
    "experts: groups": (
        lambda g: experts(g, overlap_groups=on_rank(1, 2)),
        "overlap_groups 1 on ranks [0], 2 on ranks [1]",
    ),
    "experts: top_k": (
        lambda g: experts(g, top_k=on_rank(2, 3)),
        "top_k 2 on ranks [0], 3 on ranks [1]",
    ),
    "experts: order": (
        lambda g: experts(g, given=on_rank(True, False)),
        "token_order given on ranks [0], None on ranks [1]",
    ),
    "experts: number of sequences": (
        lambda g: sequence_loss(g, 2, 3),
        "sequences 2 on ranks [0], 3 on ranks [1]",
    ),
    "experts: sequences": (
        lambda g: sequence_loss(g, 2, None),
        "sequences 2 on ranks [0], None on ranks [1]",
    ),
}


def error_of(name: str) -> str:
    """What a rank is told in the first call on a group, if it is told anything."""
    group = dist.new_group([0, 1])
    try:
        CALLS[name][0](group)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("name", CALLS)
def test_ranks_that_call_differently_are_told_who_calls_how(name: str) -> None:
    errors = run_on_ranks(error_of, 2, name)
    assert errors[0] == errors[1]
    for part in CALLS[name][1].split(".*"):
        assert part in errors[0]


def gathers_on_rank() -> list[int]:
    """How often ranks have compared after calls, the first of which is refused."""
    group, counts = dist.new_group([0, 1]), []
    layer = ExpertParallelMoE(MoEConfig(16, 8, 4, 2), groups=ExpertGroups(token=group, ep=group))
    calls: list[Callable[[], object]] = [
        lambda: ring(group, causal=on_rank(True, False)),
        lambda: ring(group),
        lambda: ring(group, dtype=torch.bfloat16),  # a new way, but not on one rank alone
        lambda: lightning(group),
        lambda: lightning(group),
        lambda: layer(torch.ones(ROWS, 16)),
        lambda: layer(torch.ones(ROWS, 16)),
    ]
    with patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gather:
        for number, call in enumerate(calls):
            with pytest.raises(ValueError) if number == 0 else nullcontext():
                call()
            counts.append(gather.call_count)
    return counts


def test_ranks_compare_until_they_agree_once() -> None:
    assert run_on_ranks(gathers_on_rank, 2) == [[1, 2, 2, 3, 3, 4, 4]] * 2


def test_a_capture_is_refused_and_a_fake_call_compares_nothing(monkeypatch) -> None:
    group = Mock(size=lambda: 2)
    with FakeTensorMode():
        assert not check_same_calls("ring_attention", group, torch.ones(2), {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="called once on a group before a CUDA graph"):
        check_same_calls("ring_attention", group, Mock(is_cuda=True), {})
