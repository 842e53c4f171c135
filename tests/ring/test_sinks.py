"""Attention sinks, a logit a head without a value: exact, and without a second backward."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import RingAttention, ring_attention
from ring.blocks.registry import BLOCKS
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks
from tests.ring.blocks.test_blocks import skip_unless_it_serves
from tests.ring.cases import (
    HEADS,
    ORDERS,
    WHOLE,
    cancelling_terms,
    planned_by,
    random_tensors,
    rank_device,
)

PACKS = ((16,), (5, 1, 10), (0, 4, 0, 7, 1), (37, 1, 2))
NAMES = ("output", "lse", "dq", "dk", "dv", "dsinks")


def results(
    tensors, sinks, layout, *, rank=0, device="cpu", lse_too=True, **kwargs
) -> list[Tensor]:
    """Results and gradients of this rank's tokens; ``tensors`` are the whole pack's."""
    *qkv, doutput = (layout.shard(x, rank).to(device) for x in tensors)
    leaves = [x.detach().to(device).requires_grad_() for x in (*qkv, sinks)]
    *qkv, sinks = leaves
    output, lse = ring_attention(*qkv, sinks=sinks, layout=layout, **kwargs)
    real = layout.shard(torch.ones(layout.num_real_tokens, 1), rank).to(device)  # no padding
    loss = (output * doutput).sum() + (0.1 * (lse.square() * real).sum() if lse_too else 0.0)
    return [x.detach().cpu() for x in (output, lse, *torch.autograd.grad(loss, leaves))]


def oracle(tensors, sinks, lengths, causal: bool, lse_too=True, window=(-1, -1)) -> list[Tensor]:
    *leaves, doutput = (x.double() for x in (*tensors[:3], sinks, tensors[3]))
    leaves = [x.detach().requires_grad_() for x in leaves]
    borders, scale = list(accumulate(lengths, initial=0)), tensors[0].shape[-1] ** -0.5
    output, lse = dense_attention(
        *leaves[:3], cu_seqlens=borders, causal=causal, scale=scale, window=window, sinks=leaves[3]
    )
    loss = (output * doutput).sum() + (0.1 * lse.square().sum() if lse_too else 0.0)
    return [x.detach() for x in (output, lse, *torch.autograd.grad(loss, leaves))]


def on_world(cases) -> list[list[Tensor]]:
    where: dict[str, Any] = {"cp_group": dist.group.WORLD, "device": rank_device()}
    rank = dist.get_rank()
    with planned_by(WHOLE):
        return [results(*case, rank=rank, **where, **kwargs) for *case, kwargs in cases]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_in_float64_over_ranks(num_ranks: int, causal: bool) -> None:
    cases = []
    for index, lengths in enumerate(PACKS):
        heads = HEADS[index % len(HEADS)]
        tensors = random_tensors(sum(lengths), *heads, 4, torch.float64)
        layout = SequenceLayout(lengths, num_ranks, ORDERS[index % len(ORDERS)])
        options: dict[str, Any] = {"causal": causal, "lse_too": bool(index % 2)}
        options |= {"block": "eager"} if index > 1 else {}  # it works in place
        options |= {"window": (3, 0)} if index == 1 else {}
        cases.append((tensors, torch.randn(heads[0], dtype=torch.float64), layout, options))
    for (tensors, sinks, layout, options), *parts in zip(
        cases, *run_on_ranks(on_world, num_ranks, cases)
    ):
        *rows, dsinks = zip(*parts)
        actual = [*(layout.unshard(of_ranks) for of_ranks in rows), sum(dsinks)]
        options.pop("block", None)
        expected = oracle(tensors, sinks, layout.document_lengths, **options)
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            assert_equal_to_rounding(a, b, what=name)


def check_budget(block: str, device: str, lengths: tuple[int, ...], head_dim: int, dtype) -> None:
    torch.manual_seed(0)
    tensors = random_tensors(sum(lengths), 4, 2, head_dim, dtype)
    sinks, layout = torch.randn(4), SequenceLayout(lengths, 1)
    kwargs: dict[str, Any] = {"device": device, "lse_too": False}
    actual = results(tensors, sinks, layout, block=block, **kwargs)
    honest = results(tensors, sinks, layout, block="eager", **kwargs)
    expected = oracle(tensors, sinks, lengths, True, lse_too=False)
    terms = cancelling_terms(tensors, lengths, True)
    for name, a, b, c in zip(NAMES, actual, expected, honest, strict=True):
        c = c if name == "dsinks" else c.to(dtype)  # a 16-bit kernel's lse is no better than that
        assert_within_budget(a, b, c, terms=terms.get(name), what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_budget(dtype: torch.dtype) -> None:
    check_budget("cpu_flash", "cpu", (40, 1, 24), 16, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("block", ["flash", "cudnn", "fa4"])
def test_within_budget_on_gpus(block: str) -> None:
    skip_unless_it_serves(block, 128, 128)
    check_budget(block, "cuda", (700, 1, 4200), 128, torch.bfloat16)


def test_a_backward_calls_each_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block, called = BLOCKS["cpu_flash"], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(1)
        return type(block).backward_varlen(block, *args, **kwargs)

    monkeypatch.setattr(block, "backward_varlen", counted)
    leaves = [x.requires_grad_() for x in random_tensors(6, 2, 1, 4, torch.float32)[:3]]
    sinks = torch.zeros(2, requires_grad=True)
    ring_attention(*leaves, sinks=sinks).output.sum().backward()
    assert called == [1]


def test_of_rows_of_a_batch() -> None:
    batch = [torch.stack(x) for x in zip(*(random_tensors(5, 2, 1, 3, torch.float64)[:3],) * 2)]
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    ring_attention(*batch, sinks=sinks).output.sum().backward()
    expected, sinks.grad = sinks.grad, None
    for row in range(2):
        ring_attention(*(x[row] for x in batch), sinks=sinks).output.sum().backward()
    assert_equal_to_rounding(sinks.grad, expected)


def test_only_sinks_that_train() -> None:
    q, k, v, _ = random_tensors(6, 2, 1, 4, torch.float64)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def output(sinks: Tensor) -> Tensor:
        return ring_attention(q, k, v, sinks=sinks).output

    assert torch.autograd.gradcheck(output, (sinks,))


def test_the_layer_has_them_as_a_parameter() -> None:
    layer = RingAttention(8, 2, 1, 4, rotary_dim=0, sinks=True, dtype=torch.float64)
    assert dict(layer.named_parameters())["sinks"].shape == (2,)
    plain = RingAttention(8, 2, 1, 4, rotary_dim=0, dtype=torch.float64)
    plain.load_state_dict({n: x for n, x in layer.state_dict().items() if n != "sinks"})
    x = torch.randn(7, 8, dtype=torch.float64)
    assert not torch.allclose(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.sinks is not None
    assert layer.sinks.grad is not None
    torch.nn.init.constant_(layer.sinks, -torch.inf)
    assert_equal_to_rounding(layer(x), plain(x))
