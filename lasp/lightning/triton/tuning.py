"""Block sizes and segment lengths: the only place that knows them."""

from functools import lru_cache
from typing import NamedTuple

import torch


class Blocks(NamedTuple):
    """How a kernel is cut.

    Attributes:
        chunk: tokens of a chunk.
        columns: output columns of a program, a power of two.
        operand: columns of query and key that one product takes, a power of two.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        max_registers: of a thread; None for as many as there are.
    """

    chunk: int
    columns: int
    operand: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


MAX_HEAD_DIM = 256  # that the kernels of the attention serve
# The time of one token of a state over that of one token of an output program, as measured.
STATE_COST = 0.6
START_COST = 256  # to fill the pipeline and to fetch the state, in the same unit
SHORTEST_SEGMENT = 2048  # tokens: its states are then a few percent of its bytes
SHORTEST_PART, LONGEST_PART = 256, 4096  # tokens
# The longest row of a tile by descriptor: 256 floats take 256 KiB of shared memory in Triton 3.6.
LONGEST_TILE_ROW = 512  # bytes

# Shared memory that programs of the newest data-centre chips may use, less what Triton keeps.
HOPPER_SHARED_BYTES = 220 * 1024
KEPT_BY_TRITON = 7 * 1024


def power_of_2(n: int) -> int:
    """The next one: Triton's own is written for kernels and takes microseconds on the host."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=1024)
def output_blocks(
    dim_in: int, dim_out: int, dtype: torch.dtype, shared_bytes: int = HOPPER_SHARED_BYTES
) -> Blocks:
    """For the output kernel: query and key have ``dim_in``, value and output ``dim_out``.

    Two groups of 4 warps hold the state, one if it is small. The pipeline is as deep as the shared
    memory of the device allows.
    """
    if dtype != torch.bfloat16:  # operands of four bytes
        return Blocks(32 if dim_in > 128 else 64, 64, max(64, power_of_2(dim_in)), 8, 1)
    chunk = 64
    # The state of 128 columns and more than 128 key rows takes products that read shared memory.
    wide = dim_out > 64 and (dim_in <= 128 or shared_bytes >= HOPPER_SHARED_BYTES)
    columns = 128 if wide else 64
    operand = _operand_columns(dim_in)
    kept = 2 * chunk * 2 * -(-dim_in // operand) * operand
    num_stages = _stages(shared_bytes, kept, 2 * chunk * columns, 3)
    num_warps = 8 if columns == 128 or dim_in > 64 else 4
    return Blocks(chunk, columns, operand, num_warps, num_stages)


class HopperBlocks(NamedTuple):
    """How the kernels for Hopper are cut, besides chunks of 64 tokens and 128 columns.

    Attributes:
        width: columns of query and key that one product takes.
        stages: chunks in shared memory.
        apart: a group of its own computes the scores.
        max_registers: of a thread, before the groups take or leave some.
    """

    width: int
    stages: int
    apart: bool
    max_registers: int


@lru_cache(maxsize=1024)
def hopper_blocks(dim_in: int, dim_out: int, dtype: torch.dtype) -> HopperBlocks | None:
    """For the output kernel on Hopper; None where the one for all GPUs serves better.

    With 64 columns or fewer one of two groups would have nothing to do.
    """
    if dtype != torch.bfloat16 or dim_out <= 64:
        return None
    width = _operand_columns(dim_in)
    apart = dim_in <= 192
    tile = 2 * 64 * 64
    stage = 2 * (2 * 64 * -(-dim_in // width) * width) + 2 * tile
    # Two tiles of scores and two of results, float32 weights of scores, barriers.
    kept = 4 * tile + 2 * tile + 2048
    stages = min(3, (HOPPER_SHARED_BYTES + KEPT_BY_TRITON - kept) // stage)
    # 16 warps hold 65536 registers, or 12.
    return HopperBlocks(width, stages, apart, 128 if apart else 168)


def waits_for_memory(dim_in: int, dim_out: int, shared: bool) -> bool:
    """Whether the kernel for all GPUs gives an output sooner than that for Hopper, on Hopper too.

    It does for heads of 128 if no document begins inside a segment: its loop then waits for memory
    alone, and its programs start sooner. One H200, 64 heads, 32768 tokens: 4 %. For dk and dv
    together the kernel for Hopper is faster.
    """
    return dim_in == dim_out == 128 and not shared


def _operand_columns(dim: int) -> int:
    """As few columns past a head as products of 64 allow, then as few products.

    Products of 256 columns leave too few registers for the rounded state beside the state. Those of
    fewer than 64 are wrong in Triton 3.6.
    """
    return 64 if -(-dim // 64) in (1, 3) else 128


def _stages(shared_bytes: int, kept: int, value: int, most: int) -> int:
    """Depth of a pipeline over tiles of so many bytes.

    Tiles that a product under way still reads (``kept``) have a buffer for each stage, those of
    values one less. The output on its way, the weighted values and the scores take the rest.
    """
    scores = 2 * 64 * 64
    return max(1, min(most, (shared_bytes - value - scores) // (kept + value)))


def state_blocks(
    key_dim: int, value_dim: int, dtype: torch.dtype, shared_bytes: int = HOPPER_SHARED_BYTES
) -> Blocks:
    """For the states of segments: two programs to a multiprocessor, if that spills nothing."""
    blocks = output_blocks(key_dim, value_dim, dtype, shared_bytes)
    if key_dim > 128 and dtype == torch.bfloat16:  # one
        kept, value = (2 * blocks.chunk * x for x in (power_of_2(key_dim), blocks.columns))
        return blocks._replace(num_stages=_stages(shared_bytes, kept, value, 4))
    two_fit = dtype == torch.bfloat16 and blocks.num_warps == 8
    return blocks._replace(
        num_stages=min(3, blocks.num_stages), max_registers=128 if two_fit else None
    )


def combine_blocks(num_segments: int) -> tuple[int, int]:
    """Segments, and elements of a state, that a program combines at a time: 2048 numbers."""
    group = min(32, power_of_2(num_segments))
    return group, 2048 // group


@lru_cache(maxsize=1024)  # one entry a layer
def segment_length(
    num_tokens: int, blocks: int, num_sms: int, reaches: tuple[int, ...], resident: int = 1
) -> int:
    """Tokens of a segment: programs that fill the GPU, with states that cost little.

    Args:
        num_tokens: T.
        blocks: programs of a segment and head.
        num_sms: multiprocessors.
        reaches: for each head, how many tokens at the end of a segment its state takes.
        resident: programs that fill a multiprocessor.
    """

    def cost(length: int) -> float:
        """What the busiest multiprocessor does, in tokens of an output program."""
        count = -(-num_tokens // length)
        rounds = -(-count * len(reaches) * blocks // (num_sms * resident))
        output = rounds * resident * (length + START_COST)
        states = sum(min(length, reach) for reach in reaches) * (count - 1)
        return output + STATE_COST * states * blocks / num_sms

    most = max(1, min(num_tokens // SHORTEST_SEGMENT, 4 * num_sms // len(reaches) + 1))
    return min((-(-num_tokens // n // 64) * 64 for n in range(1, most + 1)), key=cost)


@lru_cache(maxsize=1024)
def part_length(
    state_lengths: tuple[int, ...], reaches: tuple[int, ...], blocks: int, num_sms: int
) -> int:
    """Tokens that one program of the states sums up: two programs for each multiprocessor.

    Args:
        state_lengths: for each segment, at most so many tokens; 0 if nobody needs its state.
        reaches: for each head, at most so many tokens.
        blocks: programs of a head.
        num_sms: multiprocessors.
    """
    total = blocks * sum(
        min(length, reach) for length in state_lengths if length for reach in reaches
    )
    length = -(-total // (2 * num_sms) // 64) * 64
    return max(SHORTEST_PART, min(length, LONGEST_PART))


# ---- decoding and the layer around the attention ------------------------------------------------


class Rows(NamedTuple):
    """How a kernel over rows is cut.

    Attributes:
        rows: rows of a program, or of one step of it, a power of two.
        blocks: columns of a row, or of each part of it, powers of two.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over steps.
    """

    rows: int
    blocks: tuple[int, ...]
    num_warps: int
    num_stages: int = 1


DECODE_COLUMNS, DECODE_WARPS = 32, 4  # few columns, so that a batch of one fills the GPU
WIDEST_ROW = 16384  # features that one program holds in registers
NORM_BACKWARD_PROGRAMS = 1  # for each multiprocessor
HEADS_BACKWARD_PROGRAMS = 8  # likewise, of 4 warps each


@lru_cache(maxsize=1024)
def head_rows(head_dim: int) -> Rows:
    """For what makes heads of the projection: 2048 elements of each of q, k and v."""
    block = power_of_2(head_dim)
    return Rows(max(1, 2048 // block), (block,), 4)


@lru_cache(maxsize=1024)
def norm_rows(width: int) -> Rows:
    """For the norm and the gate: 32 elements a thread."""
    block = power_of_2(width)
    return Rows(max(1, 8192 // block), (block,), min(32, max(8, block // 1024)))


@lru_cache(maxsize=1024)
def norm_backward_rows(width: int) -> Rows:
    """For the backward: 16 elements a thread, and the loads of the next rows under way."""
    block = power_of_2(width)
    return Rows(max(1, 8192 // block), (block,), min(32, max(16, block // 512)), 2)
