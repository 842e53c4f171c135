"""``lightning_decode(impl="triton")``: one launch, as two operators of ``torch.ops.lasp``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lasp._core.operators import Operators
from lasp.lightning.decay import rates_on
from lasp.lightning.triton import tuning
from lasp.lightning.triton.decode_kernel import decode_kernel


def decode(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and new state; shapes as in :func:`lasp.lightning_decode`."""
    state = state.contiguous()
    new_state = torch.empty_like(state)
    return _launch(q, k, v, rates, state, new_state, scale), new_state


def decode_(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, scale: float) -> Tensor:
    """Output; the state is changed."""
    return _launch(q, k, v, rates, state, state, scale)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, new_state: Tensor, scale: float
) -> Tensor:
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, num_tokens, num_heads, key_dim = q.shape
    value_dim = v.shape[3]
    output = q.new_empty(batch, num_tokens, num_heads, value_dim)
    block, columns, programs = _blocks(key_dim, value_dim)
    with torch.cuda.device_of(q):
        decode_kernel[(batch * num_heads * programs,)](
            q,
            k,
            v,
            rates_on(rates, q.device, torch.float32),
            state,
            new_state,
            output,
            num_heads,
            num_tokens,
            scale,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            K=key_dim,
            V=value_dim,
            BLOCK_K=block,
            BLOCK_V=columns,
            num_warps=tuning.DECODE_WARPS,
        )
    return output


@cache
def _blocks(key_dim: int, value_dim: int) -> tuple[int, int, int]:
    """Key rows and value columns of a program, and programs of a head."""
    columns = min(tuning.DECODE_COLUMNS, tuning.power_of_2(value_dim))
    return tuning.power_of_2(key_dim), columns, -(-value_dim // columns)


def _fake_output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


_OPERATORS = Operators("lasp")
_OPERATORS.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor state, float scale)"
    " -> (Tensor, Tensor)",
    decode,
    lambda q, k, v, rates, state, scale: (_fake_output(q, v), state.new_empty(state.shape)),
)
_OPERATORS.define(
    "decode_(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor(a!) state, float scale) -> Tensor",
    decode_,
    lambda q, k, v, rates, state, scale: _fake_output(q, v),
)
