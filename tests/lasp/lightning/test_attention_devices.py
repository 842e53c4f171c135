"""Lightning attention where tensors have no values on the host: meta and GPUs."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

from lasp.lightning.attention import lightning_attention
from lasp.sequence.layout import SequenceLayout
from tests.lasp.cases import ORDERS, PACKS, Case, attend, attend_on_rank, check_against_oracle
from tests.ranks import run_on_ranks


def test_nothing_is_read_back_from_the_device() -> None:
    """Forward and backward on meta tensors, which have no values to read."""
    layout = SequenceLayout((70, 0, 80, 1200), 1)
    q, k, v = (
        torch.empty(layout.num_tokens, 3, 4, device="meta", requires_grad=True) for _ in range(3)
    )
    state = torch.empty(4, 3, 4, 4, device="meta", requires_grad=True)
    rates = torch.ones(3)
    with patch("torch.autocast", lambda *_, **__: nullcontext()):  # there is no autocast for meta
        output, final = lightning_attention(q, k, v, rates, layout=layout, initial_state=state)
        assert final is not None
        grads = torch.autograd.grad((output.sum(), final.sum()), (q, k, v, state))
    assert [g.shape for g in grads] == [x.shape for x in (q, k, v, state)]


@pytest.mark.gpu
def test_one_gpu_equals_the_oracle_without_a_device_sync() -> None:
    cases = [Case(lengths, 1) for lengths in PACKS.values()]
    check_against_oracle(cases, [[attend(case, None, 0, "cuda") for case in cases]])
    x = torch.randn(300, 3, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rates, layout = torch.ones(3), SequenceLayout((100, 0, 200), 1)
    lightning_attention(x, x, x, rates, layout=layout, impl="eager")  # copies the rates
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = lightning_attention(x, x, x, rates, layout=layout, impl="eager").output
        output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("exchange", ["all_gather", "sliced", "scan", "auto"])
def test_two_gpus_equal_the_oracle(exchange: str) -> None:
    cases = [Case(lengths, 2, order, exchange) for lengths in PACKS.values() for order in ORDERS]
    results = run_on_ranks(attend_on_rank, 2, cases, device="cuda", backend="nccl")
    check_against_oracle(cases, results)


@pytest.mark.gpu
def test_kernels_do_not_wait_for_the_device() -> None:
    x = torch.randn(300, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    rates, layout = torch.ones(3), SequenceLayout((100, 0, 200), 1)
    lightning_attention(x, x, x, rates, layout=layout, impl="triton")  # copies the rates
    torch.cuda.set_sync_debug_mode("error")
    try:
        lightning_attention(x, x, x, rates, layout=layout, impl="triton").output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
