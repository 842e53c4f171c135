"""Assignments per expert, as the top-k kernel counts them while it chooses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Histogram(NamedTuple):
    """Assignments counted where they are made (:mod:`moe_parallel.kernels.top_k_kernel`).

    Attributes:
        before: ``[programs, E]`` int32, of each program's span of tokens, the assignments of the
            tokens before.
        totals: ``[E]`` int64, of all tokens.
    """

    before: Tensor
    totals: Tensor
