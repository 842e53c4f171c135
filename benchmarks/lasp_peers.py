"""How others cut linear attention across ranks, with our kernels: the baselines of ``lasp_ranks``.

LASP          arXiv:2404.02882 as published: a rank receives the state, computes, and sends it on,
              all one after the other; backward likewise from the last rank to the first.
LASP-2        arXiv:2502.07563: one gather of all states, waited for at once, and a state pass over
              all tokens.
head parallel all-to-alls from tokens to heads and back, as Megatron's and DeepSpeed Ulysses'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Forward
from lasp import SequenceLayout, lightning_attention
from lasp.state_exchange import Wait, start_exchange


def attention(rates: Tensor, lengths: Sequence[int], impl: str) -> Forward:
    """Our kernels on one rank, over documents of these lengths."""
    layout = SequenceLayout(tuple(lengths), 1)
    return lambda q, k, v: (
        lightning_attention(
            q, k, v, rates, layout=layout, impl=impl, output_final_state=False
        ).output
    )


def synchronous(*args: Any) -> Wait:
    """``start_exchange``, waited for at once: LASP-2."""
    incoming = start_exchange(*args)()
    return lambda: incoming


class _Chain(torch.autograd.Function):
    """Receive, attend, send; one document over contiguous ranks."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rates: Tensor, impl: str) -> Tensor:
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        state = q.new_zeros(1, *q.shape[1:], v.shape[2], dtype=torch.float32)
        if rank > 0:
            dist.recv(state, src=rank - 1)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v, state)]
            output, final = lightning_attention(
                *leaves[:3], rates, initial_state=leaves[3], impl=impl
            )
        if rank < last:
            dist.send(final.detach(), dst=rank + 1)
        ctx.graph = leaves, output, final
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        rank, last = dist.get_rank(), dist.get_world_size() - 1
        leaves, output, final = ctx.graph
        grad_final = torch.zeros_like(final)
        if rank < last:
            dist.recv(grad_final, src=rank + 1)
        grads = torch.autograd.grad(
            (output, final), leaves, (grad_output, grad_final), retain_graph=True
        )
        if rank > 0:
            dist.send(grads[3], dst=rank - 1)
        return *grads[:3], None, None


def lasp(rates: Tensor, impl: str) -> Forward:
    """LASP, of one document."""
    return lambda q, k, v: _Chain.apply(q, k, v, rates, impl)


class _Heads(torch.autograd.Function):
    """[T, H, D] of a rank's tokens to [S, H / P, D] of its heads; the way back is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, to_tokens: bool) -> Tensor:
        ctx.to_tokens = to_tokens
        return _to_tokens(x) if to_tokens else _to_heads(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (_to_heads(grad) if ctx.to_tokens else _to_tokens(grad)), None


def _to_heads(x_THD: Tensor) -> Tensor:
    num_ranks = dist.get_world_size()
    by_rank = x_THD.unflatten(1, (num_ranks, -1)).transpose(0, 1).contiguous()
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank)
    return received.flatten(0, 1)


def _to_tokens(x_ShD: Tensor) -> Tensor:
    by_rank = x_ShD.contiguous().unflatten(0, (dist.get_world_size(), -1))
    received = torch.empty_like(by_rank)
    dist.all_to_all_single(received, by_rank)
    return received.transpose(0, 1).flatten(1, 2)


def move_tokens(qkv_THD: Tensor, output_THD: Tensor) -> None:
    """What ``head_parallel`` moves in a forward, without the attention between."""
    _to_heads(qkv_THD)
    _to_tokens(output_THD.unflatten(1, (dist.get_world_size(), -1)).transpose(0, 1).flatten(0, 1))


def head_parallel(rates: Tensor, lengths: Sequence[int], impl: str) -> Forward:
    """q, k and v in one all-to-all, the output in another; contiguous ranks, P divides H."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    heads = rates.numel() // num_ranks
    own = attention(rates[rank * heads : (rank + 1) * heads], lengths, impl)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        qkv = _Heads.apply(torch.cat([q, k, v], dim=-1), False)
        output = own(*qkv.split([q.shape[2], k.shape[2], v.shape[2]], dim=-1))
        return _Heads.apply(output, True)

    return forward
