"""One chunk of the chunk scan: the output of its tokens, and the state after it.

For the rows r, s of a chunk of n, in the order of the flow (see ``chunk_state``)::

    output_r = lambda^(r + SHIFT) query_r S + sum_(s <= r) lambda^(r - s) (query_r key_s) value_s
    S        = lambda^n S + sum_s lambda^(n - s - SHIFT) key_s^T value_s

Documents are masks on this fixed grid. ``reach_r`` counts the tokens of its document before row r
(a state that the document starts from counts as one): row s matters to row r iff
``r - s <= reach_r``, the state on entry iff ``reach_r > r``, row s to the state on leaving iff
``n - 1 - s <= reach_(n-1)``, the state on entry to that on leaving iff ``reach_(n-1) >= n``. That
last one holds iff no document starts in the chunk: then there is nothing to mask.

Example: documents of 3 and 5 tokens, chunks of 4, no initial states::

    reach     0 1 2 0 | 1 2 3 4
    chunk 0   row 3 sees itself alone, and it alone enters the state
    chunk 1   rows 0 to 3 see the state (1 > 0, 2 > 1, ...), and the state stays (4 >= 4)
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lasp.lightning.triton.chunk_rows_kernel import (
    flow_rows,
    load_pieces,
    load_reach,
    load_rows,
    store_rows,
)
from lasp.lightning.triton.chunk_state_kernel import as_operand


class Tensors(NamedTuple):
    """What a scan reads and writes: descriptors, or pointers with strides.

    Attributes:
        query: ``[T, H, D]``.
        key: ``[T, H, D]``.
        value: ``[T, H, E]``.
        output: pointer to ``[T, H, E]``, contiguous.
        output_tiles: its descriptor, or None.
        reach: pointer to ``[T]``.
    """

    query: Any
    key: Any
    value: Any
    output: Any
    output_tiles: Any
    reach: Any


class Strides(NamedTuple):
    """Elements from token to token, and from head to head."""

    query_t: Any
    query_h: Any
    key_t: Any
    key_h: Any
    value_t: Any
    value_h: Any


class Weights(NamedTuple):
    """What weighs on a chunk of n rows of one document.

    Attributes:
        powers: on scores ``[keys, queries]``.
        entering: on the state on entry ``[CHUNK]``.
        leaving: on rows on leaving ``[CHUNK]``.
        across: on the state on leaving.
    """

    powers: Any
    entering: Any
    leaving: Any
    across: Any


@triton.jit
def weights(n, rate, scale, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """The weights of a chunk of n rows of one document.

    Forward, the output is scaled and the state is not; in
    reverse the state is, because it is the gradient of a state that does not know the scale, and
    what it gives is not scaled again.
    """
    rows = flow_rows(CHUNK, STEP)
    # Masks come before exponentials: against the flow they would overflow.
    back = rows[None, :] - rows[:, None]  # [keys, queries]
    powers = tl.exp2(tl.where(back >= 0, -rate * back.to(tl.float32), float("-inf"))) * scale
    shift = 1 if STEP > 0 else 0
    entering = tl.exp2(-rate * (rows + shift).to(tl.float32))
    after = tl.maximum(n - 1 - rows, 0)
    leaving = tl.exp2(-rate * (after + (1 - shift)).to(tl.float32))
    if STEP > 0:
        entering *= scale
    else:
        leaving *= scale
    return Weights(powers, entering, leaving, tl.exp2(-rate * n.to(tl.float32)))


@triton.jit
def _rounded_scores(
    q, k, powers, reach, token, rows, n, border, CHUNK: tl.constexpr, STEP: tl.constexpr,
    RAGGED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weighted scores of a chunk ``[keys, queries]``, as an operand."""
    # The branch costs nothing where no document starts. It also keeps Triton from laying out the
    # scores for the product after them, in which two groups of warps would compute them twice, and
    # so do sums of weighted parts in place of one sum in the tensor cores.
    scores = tl.dot(k[0], tl.trans(q[0]), input_precision=PRECISION) * powers
    for piece in tl.static_range(1, len(q)):
        scores += tl.dot(k[piece], tl.trans(q[piece]), input_precision=PRECISION) * powers
    if border:
        reach_r = load_reach(reach, token, rows, n, CHUNK, STEP, RAGGED)
        back = rows[None, :] - rows[:, None]
        scores = tl.where(back <= reach_r[None, :], scores, 0.0)
    return as_operand(scores, OPERAND, PRECISION)


@triton.jit
def _output_of_state(
    q, state, entering, reach, token, rows, n, border, CHUNK: tl.constexpr, STEP: tl.constexpr,
    RAGGED: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """What the state on entry gives to the output ``[BLOCK_E, CHUNK]``: one piece at a time.

    A piece is rounded when the products of the one before are done: the whole state beside the
    rounded state takes more registers than there are.
    """
    rounded = as_operand(state[0], OPERAND, PRECISION)
    result = tl.dot(rounded, tl.trans(q[0]), input_precision=PRECISION)
    for piece in tl.static_range(1, len(state)):
        rounded = as_operand(state[piece], OPERAND, PRECISION)
        result = tl.dot(rounded, tl.trans(q[piece]), result, input_precision=PRECISION)
    result *= entering[None, :]
    if border:
        reach_r = load_reach(reach, token, rows, n, CHUNK, STEP, RAGGED)
        if SELECT:
            result = tl.where((reach_r > rows)[None, :], result, 0.0)
        else:  # what is not finite stays, for a second run to find
            result *= tl.where(reach_r > rows, 1.0, 0.0)[None, :]
    return result


@triton.jit
def _state_after(
    k, weighted, state, across,
    stays,  # [CHUNK]: rows of the document that leaves
    border, OPERAND: tl.constexpr, PRECISION: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """The state after a chunk."""
    after = ()
    for piece in tl.static_range(len(state)):
        keys, before = k[piece], state[piece]
        if SELECT:
            keys = tl.where(stays[:, None], keys, 0.0).to(OPERAND)
            before = tl.where(border, 0.0, before)
        after += (tl.dot(weighted, keys, before * across, input_precision=PRECISION),)
    return after


@triton.jit
def advance_chunk(
    tensors,
    strides,
    state,  # a tuple: [BLOCK_E, BLOCK_D] for every BLOCK_D key rows
    head, token, n, factors, num_heads,
    column,  # the first of value and output
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr, STEP: tl.constexpr,
    RAGGED: tl.constexpr,  # n < CHUNK
    TMA: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    SELECT: tl.constexpr,  # documents by selection: 0 * NaN would be NaN
):  # fmt: skip
    """Write the output of one chunk of n tokens; the state after it."""
    powers, entering, leaving, across = factors
    reach, rows = tensors.reach, flow_rows(CHUNK, STEP)
    reach_last = tl.load(reach + token + STEP * (n - 1))
    border = reach_last < n
    if border:
        across = tl.zeros_like(across)
    q = load_pieces(
        tensors.query, head, token, rows, n, strides.query_t,
        D, BLOCK_D, CHUNK, STEP, RAGGED, TMA, OPERAND,
    )  # fmt: skip
    k = load_pieces(
        tensors.key, head, token, rows, n, strides.key_t,
        D, BLOCK_D, CHUNK, STEP, RAGGED, TMA, OPERAND,
    )  # fmt: skip
    v = load_rows(
        tensors.value, head, token, column, rows, n, strides.value_t,
        E, BLOCK_E, CHUNK, STEP, RAGGED, TMA, OPERAND,
    )  # fmt: skip
    stays = n - 1 - rows <= reach_last
    leaving = tl.where(stays, leaving, 0.0)
    # Early: the tensor cores still work on the state of the chunk before, and what goes to shared
    # memory now takes no registers below.
    weighted = tl.trans(tl.where(stays[:, None], v, 0.0).to(OPERAND)) if SELECT else tl.trans(v)
    weighted = as_operand(weighted.to(tl.float32) * leaving[None, :], OPERAND, PRECISION)
    scores = _rounded_scores(
        q, k, powers, reach, token, rows, n, border, CHUNK, STEP, RAGGED, OPERAND, PRECISION
    )
    result = _output_of_state(
        q, state, entering, reach, token, rows, n, border,
        CHUNK, STEP, RAGGED, OPERAND, PRECISION, SELECT,
    )  # fmt: skip
    result = tl.trans(tl.dot(tl.trans(v), scores, result, input_precision=PRECISION))
    store_rows(
        tensors.output, tensors.output_tiles, result.to(tensors.output.dtype.element_ty),
        head, token, column, rows, n, num_heads * E, E, BLOCK_E, CHUNK, STEP, RAGGED, TMA,
    )  # fmt: skip
    return _state_after(k, weighted, state, across, stays, border, OPERAND, PRECISION, SELECT)
