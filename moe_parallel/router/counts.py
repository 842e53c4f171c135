"""Where an assignment stands among all: a counting sort of assignments by expert.

The router, padding and the order of rows ask the same: how many assignments come before one.

Example: 4 tokens, k = 1, experts (0, 1, 0, 0), E = 2::

    chosen      1 0 1 1        before      0 1 1 2 3
                0 1 0 0                    3 3 4 4 4

Token 2's assignment to expert 0 is row 1, token 1's to expert 1 row 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_before(experts_Tk: Tensor, num_experts: int) -> Tensor:
    """Of every expert and token, how many assignments come first: by expert, then by token.

    Args:
        experts_Tk: chosen experts, int64, each at most once a token.
        num_experts: E.

    Returns:
        ``[E, T + 1]`` int32: at (e, t) the assignments to experts below e, and those to e of tokens
        before t. Differences along a line count the assignments to e alone. A rank's T k
        assignments fit: the rows that they become are in its memory, each of many bytes.
    """
    chosen = experts_Tk.new_zeros(num_experts, experts_Tk.shape[0] + 1, dtype=torch.int32)
    chosen[:, 1:].scatter_(0, experts_Tk.T, 1)
    # As one line: for that torch has a scan that reads the GPU's memory once. Over the tokens of
    # [T, E] a thread would walk down each column by itself: 7 ms for 32768 tokens on an H100.
    return chosen.flatten().cumsum(0, dtype=torch.int32).view_as(chosen)


def at_assignments(counts_ET: Tensor, experts_Tk: Tensor) -> Tensor:
    """``[T, k]`` int64: of each assignment, the count at its expert and token."""
    return counts_ET.gather(0, experts_Tk.T).T.to(
        torch.int64, memory_format=torch.contiguous_format
    )


def counted(experts_Tk: Tensor, num_experts: int) -> Tensor:
    """``[E]`` int64: the assignments to every expert."""
    experts_A = experts_Tk.flatten()
    # Integers: the order of the sums does not matter. bincount would wait for the device.
    return experts_A.new_zeros(num_experts).index_add_(0, experts_A, torch.ones_like(experts_A))
