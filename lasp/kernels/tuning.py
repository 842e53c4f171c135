"""Block sizes and segment lengths: the only place that knows them."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """How a kernel is cut.

    Attributes:
        chunk: tokens of a chunk.
        columns: output columns of a program, a power of two.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    chunk: int
    columns: int
    num_warps: int
    num_stages: int


class Cut(NamedTuple):
    """How the tokens of a rank and the columns of a head are dealt out to programs.

    Attributes:
        length: tokens of a segment.
        wide: a program has 128 columns rather than 64, where there are so many.
    """

    length: int
    wide: bool


# One token of a wide program, and of a state of 128 columns, in tokens of a narrow program: 35, 16
# and 19.5 ns on an H200, bf16, 128 x 128.
WIDE_COST, STATE_COST = 1.8, 0.8
SHORTEST_SEGMENT = 2048  # tokens: its states are then a few percent of its bytes
SHORTEST_PART, LONGEST_PART = 256, 4096  # tokens

# Shared memory that programs of the newest data-centre chips may use, less what Triton keeps.
HOPPER_SHARED_BYTES = 220 * 1024


def output_blocks(
    dim_in: int,
    dim_out: int,
    dtype: torch.dtype,
    wide: bool,
    shared_bytes: int = HOPPER_SHARED_BYTES,
) -> Blocks:
    """For the output kernel: query and key have ``dim_in``, value and output ``dim_out``.

    A group of 4 warps holds 64 columns of the state; ``wide`` programs have two, which share one
    read of queries and keys. The pipeline is as deep as the shared memory of the device allows.
    """
    block_in = max(64, triton.next_power_of_2(dim_in))
    if dtype != torch.bfloat16:  # operands of four bytes
        return Blocks(32 if dim_in > 128 else 64, 64, 8, 1)
    chunk = 64
    wide = wide and dim_in <= 128 and dim_out > 64
    columns = 128 if wide else 64
    stage_bytes = 2 * chunk * (2 * block_in + columns)
    left_bytes = shared_bytes - 2 * chunk * (chunk + columns)  # scores, and the output on its way
    stages = max(1, min(3 if wide else 4, left_bytes // stage_bytes))
    return Blocks(chunk, columns, columns // 16, stages)


def state_blocks(
    key_dim: int, value_dim: int, dtype: torch.dtype, shared_bytes: int = HOPPER_SHARED_BYTES
) -> Blocks:
    """For the states of segments."""
    blocks = output_blocks(key_dim, value_dim, dtype, True, shared_bytes)
    return blocks._replace(num_stages=min(3, blocks.num_stages))


@lru_cache(maxsize=1024)  # one entry a layer
def segment_cut(num_tokens: int, value_dim: int, num_sms: int, reaches: tuple[int, ...]) -> Cut:
    """Programs that fill the GPU, with states that cost little.

    Args:
        num_tokens: T.
        value_dim: V.
        num_sms: multiprocessors; one program fills one.
        reaches: for each head, how many tokens at the end of a segment its state takes.
    """

    def cost(cut: Cut) -> float:
        """What the busiest multiprocessor does, in tokens of a narrow program."""
        count = -(-num_tokens // cut.length)
        programs = count * len(reaches) * -(-value_dim // (128 if cut.wide else 64))
        output = -(-programs // num_sms) * cut.length * (WIDE_COST if cut.wide else 1)
        states = sum(min(cut.length, reach) for reach in reaches) * (count - 1)
        return output + STATE_COST * states * value_dim / 128 / num_sms

    most = max(1, min(num_tokens // SHORTEST_SEGMENT, 4 * num_sms // len(reaches) + 1))
    lengths = [-(-num_tokens // count // 64) * 64 for count in range(1, most + 1)]
    return min((Cut(n, wide) for n in lengths for wide in (True, False)), key=cost)


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
