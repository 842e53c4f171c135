"""What travels where tokens cross to a rank once, and when: bytes, rows before counts, gathers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_parallel import (
    MoEConfig,
    TokenOrder,
)
from moe_parallel import layer as layer_module
from moe_parallel.dispatch import all_to_all
from moe_parallel.dispatch.token_rows import RowFormat
from moe_parallel.router import checks
from moe_parallel.router.counts import HostTokenCounts, Routing
from tests.moe_parallel.batch import groups_of, random_batch
from tests.moe_parallel.dispatch.test_sending import EP2, FINE, TOKENS
from tests.moe_parallel.layers import (
    build,
)
from tests.ranks import run_on_ranks


def sent_bytes(config: MoEConfig) -> tuple[list[int], list[int]]:
    """Rank function: tokens and assignments that go elsewhere, and bytes that do, run by run."""
    layer = build(config, torch.float64, False, groups=groups_of(EP2).experts)
    rank, found = layer.mesh.token_rank, []
    exchange = dist.all_to_all_single

    def counting(received: Tensor, sent: Tensor, receive: Any, send: Any, **how: Any) -> Any:
        found.append(send[1 - rank] * sent[0].numel() * sent.element_size())
        return exchange(received, sent, receive, send, **how)

    x = random_batch(40, 10, seed=rank).x.requires_grad_()
    with patch.object(dist, "all_to_all_single", counting):
        layer(x).output.sum().backward()
    experts = layer.gate(x, TokenOrder.contiguous([40, 40])).experts
    elsewhere = experts // 8 != rank
    return [int(elsewhere.any(1).sum()), int(elsewhere.sum())], found


def test_a_token_is_sent_to_a_rank_once_there_and_back() -> None:
    row = RowFormat(10, 4, torch.float64, torch.float64).width * 8
    assert row == 10 * 8 + 4 * 4 + 4 * 8
    once, singly = (
        run_on_ranks(sent_bytes, 2, replace(TOKENS, send=send))
        for send in ("tokens", "assignments")
    )
    for rank in range(2):
        (tokens, _), (others, _) = once[rank][0], once[1 - rank][0]
        assert once[rank][1] == [tokens * row, others * row] * 2
        (_, rows), (_, other_rows) = singly[rank][0], singly[1 - rank][0]
        assert singly[rank][1] == [rows * 80, other_rows * 80] * 2
        assert tokens < 0.6 * rows


def first_waits(compared: bool) -> tuple[list[str], list[Tensor]]:
    """Rank function: what comes first, the counts or the rows; output and gradients."""
    layer = build(TOKENS, torch.float32, False, groups=groups_of(EP2).experts)
    x = random_batch(20, 10, seed=layer.mesh.token_rank).x.float().requires_grad_()
    order, seen = TokenOrder.contiguous([20, 20]) if compared else None, []
    layer(x, token_order=order)  # the ranks compare the order once

    def noting(name: str, true: Any) -> Any:
        return lambda *args, **how: seen.append(name) or true(*args, **how)

    with (
        patch.object(dist, "all_to_all_single", noting("rows", dist.all_to_all_single)),
        patch.object(HostTokenCounts, "wait", noting("counts", HostTokenCounts.wait)),
    ):
        output = layer(x, token_order=order).output
    gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    return seen[:1], [output.detach(), *gradients]


def test_rows_leave_before_the_host_has_counts_where_nearly_all_go_everywhere() -> None:
    compared, not_compared = (run_on_ranks(first_waits, 2, known) for known in (True, False))
    for (seen, found), (others, expected) in zip(compared, not_compared):
        assert (seen, others) == (["rows"], ["counts"])
        assert all(map(torch.equal, found, expected))


def gathered(impl: str, dtype: torch.dtype, cast: bool) -> list[list[Any]]:
    """Rank function: collectives in order, and results, of tokens gathered and sent in rows."""
    found: list[list[Any]] = []
    config = replace(FINE, impl=impl, gemm="grouped" if cast else "auto")
    layer = build(config, dtype, False, groups=groups_of(EP2).experts)
    x = random_batch(20, 64, seed=layer.mesh.token_rank).x.to(dtype).requires_grad_()
    order = TokenOrder.contiguous([20, 20])
    if cast:  # as FSDP does, after the call was prepared
        x = x.detach().float().requires_grad_()
        layer.experts.register_forward_pre_hook(lambda _, given: (given[0].to(dtype), *given[1:]))
        layer_module.check_hidden = lambda *_: None  # it would know FSDP's parameters
    layer(x, token_order=order)  # the ranks compare the order once
    for even in (True, False):
        order.__dict__["is_even"], seen = even, []
        gather, exchange = all_to_all.all_gather_into, dist.all_to_all_single

        def noting(name: str, true: Any, seen: list[str] = seen) -> Any:
            return lambda *args, **how: seen.append(name) or true(*args, **how)

        with (
            patch.object(all_to_all, "all_gather_into", noting("tokens", gather)),
            patch.object(dist, "all_to_all_single", noting("rows", exchange)),
            patch.object(Routing, "aux_loss", property(noting("loss", Routing.aux_loss.fget))),
        ):
            result = layer(x, token_order=order)
            output = result.output + result.aux_loss
            gradients = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
        found.append([seen, output.detach(), *gradients])
    layer_module.check_hidden = checks.check_hidden
    return found


@pytest.mark.parametrize(
    ("impl", "dtype", "cast"),
    [
        ("eager", torch.float64, False),
        ("eager", torch.bfloat16, True),
        ("triton", torch.bfloat16, False),
    ],
)
def test_tokens_that_all_go_everywhere_are_gathered(
    impl: str, dtype: torch.dtype, cast: bool
) -> None:
    if impl == "triton":
        pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")
    for (seen, *actual), (other, *expected) in run_on_ranks(gathered, 2, impl, dtype, cast):
        again = ["tokens"] * cast
        assert seen == ["tokens", "loss", *again, "rows", "rows", "loss", "tokens", "rows"]
        assert other == ["rows", "rows", "loss", "rows", "rows"]
        assert all(map(torch.equal, actual, expected))
