"""What travels with a token that crosses to a rank once: rows of its experts there, and weights.

A row ends in K int32 rows and K float32 numbers, of which a kernel is given the first ones and the
distance to those of the next row. A slot whose expert lives elsewhere has row -1.

Example, k = 2, two ranks of two experts, experts (0, 3) (1, 0)::

    token_row     0, 2      rows of rank 0    (0, -1) (3, 1)
                  1, -1     rows of rank 1    (-1, 5)
"""

import triton
import triton.language as tl


@triton.jit
def _slots(num_rows, K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr):
    """Rows, slots, and which exist, of this program."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    slot = tl.arange(0, K_PAD)[None, :]
    return row, slot, (row < num_rows) & (slot < K)


@triton.jit(do_not_specialize=["num_tokens"])
def pack_kernel(
    experts,  # [T, K] int64
    row,  # [T, K] int64: of each assignment, among all that its expert takes, -1 if dropped
    weights,  # [T, K] float32
    token_row,  # [T, RANKS] int64: of each token and rank, -1 where it does not go
    sent_rows,  # [A, K] int32
    sent_weights,  # [A, K] float32
    num_tokens,  # T
    STRIDE: tl.constexpr,  # between the rows that travel
    K: tl.constexpr, RANKS: tl.constexpr, E_LOCAL: tl.constexpr, K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Each program takes some tokens."""
    token, slot, mask = _slots(num_tokens, K, K_PAD, ROWS)
    rank_of = tl.load(experts + token * K + slot, mask=mask, other=0) // E_LOCAL
    of_slot = tl.load(row + token * K + slot, mask=mask, other=-1)
    weight = tl.load(weights + token * K + slot, mask=mask, other=0.0)
    for rank in range(RANKS):
        place = tl.load(token_row + token * RANKS + rank, mask=token < num_tokens, other=-1)
        goes = mask & (place >= 0)
        here = tl.where(rank_of == rank, of_slot, -1).to(tl.int32)
        tl.store(sent_rows + place * STRIDE + slot, here, mask=goes)
        tl.store(sent_weights + place * STRIDE + slot, weight, mask=goes)


@triton.jit(do_not_specialize=["num_rows"])
def unpack_kernel(
    sent_rows,  # [A, K] int32
    sent_weights,  # [A, K] float32
    row,  # [A, K] int64
    weights,  # [A, K] float32
    row_weights,  # [R] float32: of each row that an expert takes
    num_rows,  # A
    STRIDE: tl.constexpr,  # between the rows that travel
    K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program takes some rows that arrived."""
    arrived, slot, mask = _slots(num_rows, K, K_PAD, ROWS)
    place = tl.load(sent_rows + arrived * STRIDE + slot, mask=mask, other=-1).to(tl.int64)
    weight = tl.load(sent_weights + arrived * STRIDE + slot, mask=mask, other=0.0)
    tl.store(row + arrived * K + slot, place, mask=mask)
    tl.store(weights + arrived * K + slot, weight, mask=mask)
    tl.store(row_weights + place, weight, mask=mask & (place >= 0))


@triton.jit(do_not_specialize=["num_rows"])
def pack_gradients_kernel(
    row_gradients,  # [R] float32: of the weight of each row that an expert took
    row,  # [A, K] int64
    sent,  # [A, K] float32
    num_rows,  # A
    STRIDE: tl.constexpr,  # between the rows that travel
    K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program takes some rows that go back; slots of experts elsewhere get 0."""
    arrived, slot, mask = _slots(num_rows, K, K_PAD, ROWS)
    place = tl.load(row + arrived * K + slot, mask=mask, other=-1)
    grad = tl.load(row_gradients + place, mask=mask & (place >= 0), other=0.0)
    tl.store(sent + arrived * STRIDE + slot, grad, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def unpack_gradients_kernel(
    experts,  # [T, K] int64
    token_row,  # [T, RANKS] int64
    sent,  # [A, K] float32
    gradients,  # [T, K] float32
    num_tokens,  # T
    STRIDE: tl.constexpr,  # between the rows that travel
    K: tl.constexpr, RANKS: tl.constexpr, E_LOCAL: tl.constexpr, K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Each program takes some tokens; a weight's gradient comes from its expert's rank."""
    token, slot, mask = _slots(num_tokens, K, K_PAD, ROWS)
    rank = tl.load(experts + token * K + slot, mask=mask, other=0) // E_LOCAL
    place = tl.load(token_row + token * RANKS + rank, mask=mask, other=0)
    grad = tl.load(sent + place * STRIDE + slot, mask=mask, other=0.0)
    tl.store(gradients + token * K + slot, grad, mask=mask)
