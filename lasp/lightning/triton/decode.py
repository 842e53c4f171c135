"""``lightning_decode(impl="triton")``: one launch, which reads and writes the state once.

One program holds all key rows of a block of value columns of the state of one head and walks the
new tokens of its sequence. Columns of values do not depend on each other, so nothing is shared::

    S = lambda S + key^T value        output = scale query S

Example: K = V = 2, lambda = 1/2, and one new token with query (1, 0), key (1, 2), value (3, 4)::

    S = (2 0; 0 2)   becomes   (1 0; 0 1) + (3 4; 6 8) = (4 4; 6 9)   and the output is (4, 4)
"""

# No ``from __future__ import annotations``: Triton's interpreter reads the annotations of kernels.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lasp._core.launcher import ALIGNMENT, Launcher, aligned, launcher_of, strides_of
from lasp._core.operators import Operators
from lasp.lightning.decay import rates_on
from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_state_kernel import LOG2E


@triton.jit(do_not_specialize=["num_heads"])
def decode_kernel(
    query,  # [B, T, H, K], any strides but that of the last dim, which is 1
    key,  # [B, T, H, K]
    value,  # [B, T, H, V]
    rates,  # [H] float32
    state,  # [B, H, K, V] float32, contiguous
    new_state,  # likewise; may be the same
    slots,  # [B] int64: the state of each sequence, negative for padding; not read without SLOTS
    output,  # [B, T, H, V], contiguous
    num_heads,
    num_tokens,  # T
    scale, query_stride_b, query_stride_t, query_stride_h, key_stride_b, key_stride_t, key_stride_h,
    value_stride_b, value_stride_t, value_stride_h, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """One program a sequence, head and block of value columns."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block, row = program % blocks, program // blocks
    head, sequence = row % num_heads, (row // num_heads).to(tl.int64)
    k_cols = tl.arange(0, BLOCK_K)
    v_cols = block * BLOCK_V + tl.arange(0, BLOCK_V)
    k_inside, v_inside = k_cols < K, v_cols < V
    inside = k_inside[:, None] & v_inside[None, :]
    state_row = row.to(tl.int64)
    if SLOTS:
        slot = tl.load(slots + sequence)
        inside = k_cols[:, None] < tl.where(slot < 0, 0, K)
        inside = inside & v_inside[None, :]
        state_row = slot * num_heads + head
    offsets = state_row * (K * V) + k_cols[:, None] * V + v_cols[None, :]
    s = tl.load(state + offsets, mask=inside, other=0.0)
    decay = tl.exp2(-tl.load(rates + head) * LOG2E)

    head = head.to(tl.int64)
    query += sequence * query_stride_b + head * query_stride_h + k_cols
    key += sequence * key_stride_b + head * key_stride_h + k_cols
    value += sequence * value_stride_b + head * value_stride_h + v_cols
    output += (sequence * num_tokens * num_heads + head) * V + v_cols
    for token in range(num_tokens):
        q = tl.load(query + token * query_stride_t, mask=k_inside, other=0.0).to(tl.float32)
        k = tl.load(key + token * key_stride_t, mask=k_inside, other=0.0).to(tl.float32)
        v = tl.load(value + token * value_stride_t, mask=v_inside, other=0.0).to(tl.float32)
        s = s * decay + k[:, None] * v[None, :]
        o = tl.sum(q[:, None] * s, axis=0) * scale
        tl.store(output + token * (num_heads * V), o.to(output.dtype.element_ty), mask=v_inside)
    tl.store(new_state + offsets, s, mask=inside)


def decode(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and new state; shapes as in :func:`lasp.lightning_decode`."""
    state = aligned(state.contiguous())
    new_state = torch.empty_like(state)
    return _launch(q, k, v, rates, (state, new_state), None, scale), new_state


def decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    """Output; the state is changed."""
    return _launch(q, k, v, rates, (state, state), slots, scale)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    states: tuple[Tensor, Tensor],
    slots: Tensor | None,
    scale: float,
) -> Tensor:
    q, k, v = (aligned(x if x.stride(3) == 1 else x.contiguous()) for x in (q, k, v))
    launch, programs, shape = _plan(
        q.shape, q.stride(), k.stride(), v.shape, v.stride(), q.dtype, q.device,
        states[0].data_ptr() % ALIGNMENT == 0,  # it may be changed where it lies
        float(scale), slots is not None,
    )  # fmt: skip
    output = q.new_empty(*shape)
    on_device = aligned(rates_on(rates, q.device, torch.float32))
    launch(programs, q, k, v, on_device, *states, q if slots is None else aligned(slots), output)
    return output


@lru_cache(maxsize=1024)
def _plan(
    shape: tuple[int, ...],
    query: tuple[int, ...],
    key: tuple[int, ...],
    value_shape: tuple[int, ...],
    value: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    aligned_state: bool,
    scale: float,
    by_slot: bool,
) -> tuple[Launcher, int, tuple[int, ...]]:
    """The launch for shapes and strides, how many programs, and the shape of the output."""
    batch, num_tokens, num_heads, key_dim = shape
    value_dim = value_shape[3]
    columns = min(tuning.DECODE_COLUMNS, tuning.power_of_2(value_dim))
    launch = launcher_of(
        decode_kernel,
        device,
        (dtype, aligned_state),
        num_heads=num_heads,
        num_tokens=num_tokens,
        scale=scale,
        **strides_of("bth", query=query, key=key, value=value),
        K=key_dim,
        V=value_dim,
        BLOCK_K=tuning.power_of_2(key_dim),
        BLOCK_V=columns,
        SLOTS=by_slot,
        num_warps=tuning.DECODE_WARPS,
    )
    programs = batch * num_heads * -(-value_dim // columns)
    return launch, programs, (batch, num_tokens, num_heads, value_dim)


def _fake_output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


_OPERATORS = Operators("lasp")
call = _OPERATORS.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor state, float scale)"
    " -> (Tensor, Tensor)",
    decode,
    lambda q, k, v, rates, state, scale: (_fake_output(q, v), state.new_empty(state.shape)),
)
call_ = _OPERATORS.define(
    "decode_(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor(a!) state, Tensor? slots,"
    " float scale) -> Tensor",
    decode_,
    lambda q, k, v, rates, state, slots, scale: _fake_output(q, v),
)
