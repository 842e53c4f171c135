"""The table of wrong calls: each raises a ValueError that names the argument, on every rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lasp.lightning.attention import lightning_attention
from lasp.lightning.decay import decay_rates
from lasp.sequence.layout import SequenceLayout
from tests.ranks import run_on_ranks, subgroup

T, H, K, V = 6, 4, 3, 5
NEEDS_TRITON = {
    "condition": find_spec("triton") is None or torch.cuda.is_available(),
    "reason": "needs triton, interpreted",
}


def good() -> dict[str, Any]:
    """A call that works on two ranks; the table breaks one thing at a time."""
    return {
        "q": torch.zeros(T, H, K),
        "k": torch.zeros(T, H, K),
        "v": torch.zeros(T, H, V),
        "rates": decay_rates(H, 0, 2),
        "layout": SequenceLayout((7, 5), 2),
        "cp_group": dist.group.WORLD,
    }


def rates_with(value: float) -> torch.Tensor:
    rates = torch.ones(H)
    rates[1] = value
    return rates


def group_of_rank_0() -> Any:
    """On rank 1 what torch hands to those outside of a group; on rank 0 a group of one."""
    return subgroup(0)


# name of the row -> (what must be said, what is passed instead)
TABLE: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "q has two dims": ("q must.*: split the heads", lambda: {"q": torch.zeros(T, K)}),
    "q is empty": ("q must.*: split the heads", lambda: {"q": torch.zeros(0, H, K)}),
    "q is integer": (
        "q must.*: convert",
        lambda: {n: torch.zeros(T, H, 3, dtype=torch.long) for n in "qkv"},
    ),
    "k has another head dim": ("k must.*: repeat heads", lambda: {"k": torch.zeros(T, H, K + 1)}),
    "k has fewer heads": ("k must", lambda: {"k": torch.zeros(T, 1, K)}),
    "k in another dtype": ("k must.*: convert", lambda: {"k": torch.zeros(T, H, K).bfloat16()}),
    "v has other tokens": ("v must.*: give it", lambda: {"v": torch.zeros(T + 1, H, V)}),
    "v is batched, q is not": ("v must", lambda: {"v": torch.zeros(1, T, H, V)}),
    "v on another device": ("v must.*: move", lambda: {"v": torch.zeros(T, H, V, device="meta")}),
    "rates not sliced for TP": ("rates must.*tp_rank", lambda: {"rates": decay_rates(8, 0, 2)}),
    "rates have two dims": ("rates must", lambda: {"rates": torch.zeros(1, H)}),
    "rates in bf16": ("rates must", lambda: {"rates": torch.zeros(H).bfloat16()}),
    "rates on another device": (
        "rates must.*: pass",
        lambda: {"rates": torch.zeros(H, device="meta")},
    ),
    "rates require grad": ("rates must", lambda: {"rates": torch.zeros(H, requires_grad=True)}),
    "rates are NaN": ("rates must", lambda: {"rates": rates_with(float("nan"))}),
    "rates are infinite": ("rates must", lambda: {"rates": rates_with(float("inf"))}),
    "rates are negative": ("rates must.*: see", lambda: {"rates": rates_with(-0.1)}),
    "layout of another length": ("layout must", lambda: {"layout": SequenceLayout((7, 9), 2)}),
    "layout for other ranks": ("layout must", lambda: {"layout": SequenceLayout((7, 5), 3)}),
    "layout missing": ("layout must", lambda: {"layout": None}),
    "cp_group missing": ("layout must.*cp_group", lambda: {"cp_group": None}),
    "rank not in cp_group": ("cp_group", lambda: {"cp_group": group_of_rank_0()}),
    "batch of packs": (
        "layout must hold one document",
        lambda: {n: torch.zeros(2, T, H, 3) for n in "qkv"},
    ),
    "initial_state of other documents": (
        "initial_state must",
        lambda: {"initial_state": torch.zeros(3, H, K, V)},
    ),
    "initial_state transposed": (
        "initial_state must.*: one state",
        lambda: {"initial_state": torch.zeros(2, H, V, K)},
    ),
    "initial_state in bf16": (
        "initial_state must",
        lambda: {"initial_state": torch.zeros(2, H, K, V).bfloat16()},
    ),
    "initial_state in fp64": (
        "initial_state must",
        lambda: {"initial_state": torch.zeros(2, H, K, V).double()},
    ),
    "unknown exchange": ("exchange must", lambda: {"exchange": "ring"}),
    "one_hop is not exact": (
        "exchange must be another",
        lambda: {"layout": SequenceLayout((12,), 2, "zigzag"), "exchange": "one_hop"},
    ),
    "scale is NaN": ("scale must be finite", lambda: {"scale": float("nan")}),
    "state_eps is NaN": ("state_eps must", lambda: {"state_eps": float("nan")}),
    "state_eps is negative": ("state_eps must", lambda: {"state_eps": -1e-9}),
    "state_eps keeps nothing": ("state_eps must", lambda: {"state_eps": 1.0}),
    "exchange is no name": ("exchange must", lambda: {"exchange": None}),
    "exchange of earlier versions": ("exchange must", lambda: {"exchange": "serial"}),
    "rates are a list": ("rates must", lambda: {"rates": [0.1] * H}),
    "layout is a list": ("layout must", lambda: {"layout": [7, 5]}),
    "unknown impl": ("impl must", lambda: {"impl": "cuda"}),
}


def call(row: str, impl: str) -> str:
    arguments = good() | {"impl": impl} | TABLE[row][1]()
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "rates")]
    try:
        lightning_attention(*tensors, **arguments)
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def call_all(impl: str) -> dict[str, str]:
    return {row: call(row, impl) for row in TABLE}


def call_good() -> torch.Size:
    arguments = good()
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "rates")]
    return lightning_attention(*tensors, **arguments).output.shape


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rates_of_a_gpu_call_are_checked_wherever_they_are(device: str) -> None:
    x = torch.zeros(T, H, K, device="cuda")
    with pytest.raises(ValueError, match="rates must be finite"):
        lightning_attention(x, x, x, rates_with(float("nan")).to(device))


@pytest.fixture(
    scope="module",
    params=["eager", pytest.param("triton", marks=pytest.mark.skipif(**NEEDS_TRITON))],
)
def said(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    assert run_on_ranks(call_good, 2) == [(T, H, V)] * 2
    return run_on_ranks(call_all, 2, request.param)


@pytest.mark.parametrize("row", TABLE)
def test_raises_on_every_rank(row: str, said: list[dict[str, str]]) -> None:
    for on_rank in said:
        assert re.search(TABLE[row][0], on_rank[row])


def test_nothing_is_left_hanging_after_errors(said: list[dict[str, str]]) -> None:
    assert run_on_ranks(call_good, 2) == [(T, H, V)] * 2
