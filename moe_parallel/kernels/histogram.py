"""Assignments per expert, as the top-k kernel counts them while it chooses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Histogram(NamedTuple):
    """Assignments counted where they are made (:mod:`moe_parallel.kernels.top_k_kernel`).

    Where tokens are counted for each of P ranks too, their P columns follow those of the experts: a
    token counts once for a rank that has some of its experts.

    Attributes:
        before: ``[programs, E + P]`` int32, of each program's span of tokens, the assignments of
            the tokens before.
        totals: ``[E + P]`` int64, of all tokens.
        num_ranks: P; 0: tokens are not counted.
    """

    before: Tensor
    totals: Tensor
    num_ranks: int = 0
