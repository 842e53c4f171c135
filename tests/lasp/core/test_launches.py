"""Launches of every kernel of the package: what is compiled, and what a warm call does."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp import LightningOptions, SequenceLayout, lightning_attention, lightning_decode
from lasp._core.launcher import Launcher
from lasp.layers.norm_gate import norm_gate
from lasp.lightning.triton import schedule
from tests.lasp.cases import bits_equal
from tests.lasp.layers.test_heads import heads_with
from tests.lasp.lightning.test_kernels import DEVICE, small_blocks


def specialization(x: Any) -> Any:
    """What Triton compiles for, of an argument that differs between calls."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16
    if type(x) is tuple:
        return x[0].dtype, x[1].block, x[0].data_ptr() % 16
    return type(x)


def test_calls_of_a_launcher_differ_in_nothing_that_is_compiled() -> None:
    """Calls draw any layouts, states, strides, addresses, dtypes and directions."""
    seen: dict[Launcher, set[tuple[Any, ...]]] = defaultdict(set)

    def note(self: Launcher, programs: int, *arguments: Any) -> None:
        seen[self].add(tuple(specialization(x) for x in arguments))

    rates = torch.tensor([0.0, 0.25, 8.0])
    with patch.object(Launcher, "__call__", note), small_blocks():
        for dtype in (torch.float32, torch.bfloat16):
            for key_dim, value_dim in ((32, 32), (5, 33)):
                for lengths in ((75,), (0, 31, 4, 40), (4, 30, 41)):
                    for offset in (0, 1):
                        for states in (False, True):
                            call(lengths, key_dim, value_dim, dtype, offset, states, rates)
    assert len(seen) > 20
    assert all(len(cases) == 1 for cases in seen.values())


def call(
    lengths: tuple[int, ...],
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    offset: int,
    with_states: bool,
    rates: Tensor,
) -> None:
    """Every kernel of the package; tensors begin ``offset`` elements into memory."""

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.zeros(size + offset, dtype=dtype)[offset:].view(shape).requires_grad_()

    x, gate, weight = (made(*shape, dtype=dtype) for shape in ((7, 48), (7, 48), (48,)))
    fused = made(7, 4, 3 * key_dim, dtype=dtype)
    parts = heads_with("triton", LightningOptions())(fused)
    torch.autograd.grad(parts, fused, [made(*part.shape, dtype=dtype).detach() for part in parts])
    y = norm_gate(x, gate, weight, eps=1e-6, impl="triton")
    torch.autograd.grad(y, (x, gate, weight), made(7, 48, dtype=dtype).detach())

    tokens, heads = sum(lengths), len(rates)
    q, k = (made(tokens, heads, key_dim, dtype=dtype) for _ in range(2))
    v = made(tokens, heads, value_dim, dtype=dtype)
    state = made(len(lengths), heads, key_dim, value_dim) if with_states else None
    layout = SequenceLayout(lengths, 1)
    output, final = lightning_attention(
        q, k, v, rates, layout=layout, impl="triton", initial_state=state,
        output_final_state=with_states,
    )  # fmt: skip
    results = [output] if final is None else [output, final]
    leaves = [q, k, v] if state is None else [q, k, v, state]
    grads = [made(*x.shape, dtype=x.dtype) for x in results]
    torch.autograd.grad(results, leaves, [x.detach() for x in grads])
    if state is not None:
        rows = [x.detach()[: len(lengths), None] for x in (q, k, v)]
        for in_place in (False, True):
            lightning_decode(*rows, rates, state.detach(), in_place=in_place, impl="triton")


@pytest.mark.parametrize("device", [DEVICE])
def test_an_unaligned_input_after_an_aligned_one_gives_the_same_bits(device: str) -> None:
    memory = torch.randn(3, 40 * 2 * 64 + 1, device=device).bfloat16()
    rates = torch.tensor([0.1, 0.0])
    shifted = [x[1:].view(40, 2, 64) for x in memory]
    assert all(x.data_ptr() % 16 for x in shifted[:1])
    results = [
        lightning_attention(*inputs, rates, impl="triton")
        for inputs in ([x.clone() for x in shifted], shifted)
    ]
    assert bits_equal(*results)


def test_a_warm_call_plans_nothing_however_many_documents_there_are() -> None:
    layout = SequenceLayout((1,) * 100_000, 1)
    q, k, v = (torch.zeros(100_000, 1, 1, requires_grad=True) for _ in range(3))
    rates = torch.zeros(1)

    def both() -> None:
        result = lightning_attention(
            q, k, v, rates, layout=layout, impl="triton", output_final_state=False
        ).output
        torch.autograd.grad(result, (q, k, v), do)

    do, taken = torch.zeros(100_000, 1, 1), []
    with patch.object(Launcher, "__call__", lambda *_: None):
        both()
        unplanned = dict.fromkeys(("_plan_forward", "_plan_backward", "_context"))
        with patch.multiple(schedule, **unplanned):
            for _ in range(20):
                start = time.perf_counter()
                both()
                taken.append(time.perf_counter() - start)
    assert min(taken) < 2e-3  # of the host, both directions
