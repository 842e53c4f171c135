"""How the experts of a rank are cut into groups, and the order in which rows leave for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from lasp._core.cache import tensor_cache
from lasp._core.host_constants import to_device

# Forward: 1.8 ms at 600 TFLOP/s. Two smaller groups were slower than one on an H200, in both
# directions: 64 experts a rank of 2048 x 768 and 128 of 4096 x 1024, 8192 tokens, 8 experts each.
GROUP_FLOPS = 2**40


@cache
def expert_groups(num_local: int, num_groups: int) -> tuple[range, ...]:
    """The rank's experts in groups, in order; the first and the last are half as large as others.

    Nothing is computed while the first rows travel there, nor while the last travel back.
    """
    inner = (num_local * (group - 0.5) / (num_groups - 1) for group in range(1, num_groups))
    return tuple(range(*cut) for cut in pairwise([0, *map(round, inner), num_local]))


def most_groups(rank_rows: int, hidden_size: int, ffn_size: int) -> int:
    """The most groups whose products, ``GROUP_FLOPS`` each, take longer than the host to queue one.

    Args:
        rank_rows: that the average rank sends.
        hidden_size: of a row.
        ffn_size: of a whole expert.
    """
    return max(1, 6 * rank_rows * hidden_size * ffn_size // GROUP_FLOPS)


def dispatch_positions(num_experts: int, ep_size: int, groups: Sequence[range]) -> list[int]:
    """For each expert of all ranks its position in the order in which rows leave."""
    num_local = num_experts // ep_size
    order = [ep * num_local + local for group in groups for ep in range(ep_size) for local in group]
    positions = [0] * num_experts
    for position, expert in enumerate(order):
        positions[expert] = position
    return positions


@tensor_cache(maxsize=64)
def positions_on(
    device: torch.device, num_experts: int, ep_size: int, groups: tuple[range, ...]
) -> Tensor:
    """:func:`dispatch_positions` on a device, int64 ``[E]``; the last ones are kept."""
    with torch.inference_mode(False):  # remembered, and used in training too
        positions = dispatch_positions(num_experts, ep_size, groups)
        return to_device(torch.tensor(positions, device="cpu"), device)
