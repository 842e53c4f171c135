"""What an expert layer computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lasp._core.impl import Impl, check_impl
from moe_parallel.topology import check_sizes

DropPolicy = Literal["position", "probability"]
Gemm = Literal["auto", "loop", "grouped"]


@dataclass(frozen=True)
class MoEConfig:
    """What an expert layer computes, whatever the ranks.

    Args:
        hidden_size: width of a token.
        ffn_size: F, the FFN width of a whole expert.
        num_experts: E.
        top_k: k, experts a token; at least 2 of several experts. The weight of a single
            choice, a softmax over one logit, is 1 whatever the gate says: it would not learn.
        capacity_factor: in training mode an expert keeps at most ceil(factor * N * k / E)
            assignments of the N tokens of all ranks; None keeps all, as eval mode does.
        drop_policy: which assignments stay when an expert is full: the first by ``position``, or
            those of highest ``probability``.
        aux_loss_coefficient: weight of the load-balancing loss
            (:func:`moe_parallel.router.route.route`).
        gemm: how the experts multiply (:class:`moe_parallel.experts.experts.Experts`).
        overlap_groups: into how many groups a rank's experts are cut, so that the communication of
            one runs under the products of another (:mod:`moe_parallel.pipeline.pipeline`); at most
            the experts of a rank. None: by the rule of
            :func:`moe_parallel.dispatch.dispatcher.Dispatcher.overlap_groups`. Results have the
            same bits for any number.
        max_rows: most rows (kept assignments) that the experts of one rank may take in a call; more
            raise on every rank of its EP x ETP block, before any row travels. None: as many as come
            (docs/moe.md has what they take of memory).
        pad_to_capacity: in training mode every rank sends as many rows to every expert, so that no
            shape depends on the routing and nothing is copied to the host; capacity is then counted
            on each rank, see :mod:`moe_parallel.dispatch.padding`. Needs a ``capacity_factor`` and
            drops by position.
        impl: of the router, the activation, and the rows of tokens and their sums: ``eager`` is
            plain torch, ``triton`` kernels, ``auto`` triton on CUDA but for float64
            (:func:`lasp._core.impl.chosen_impl`).

    Raises:
        ValueError: naming the argument.
    """

    hidden_size: int
    ffn_size: int
    num_experts: int
    top_k: int
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "position"
    aux_loss_coefficient: float = 0.01
    gemm: Gemm = "auto"
    overlap_groups: int | None = None
    max_rows: int | None = None
    pad_to_capacity: bool = False
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        check_sizes(self, "hidden_size", "ffn_size", "num_experts", "top_k")
        for name in ("overlap_groups", "max_rows"):
            if getattr(self, name) is not None:
                check_sizes(self, name)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts {self.num_experts}, got {self.top_k}"
            )
        if self.top_k == 1 < self.num_experts:
            raise ValueError(
                f"top_k must be at least 2 with num_experts {self.num_experts}, got 1: weights are"
                " the softmax over the chosen logits, that of one logit is always 1, and the gate"
                " would get no gradient from the task"
            )
        if not 0 <= self.aux_loss_coefficient < math.inf:
            raise ValueError(
                f"aux_loss_coefficient must be >= 0 and finite, got {self.aux_loss_coefficient}"
            )
        if self.gemm not in get_args(Gemm):
            raise ValueError(f"gemm must be one of {get_args(Gemm)}, got {self.gemm!r}")
        check_impl(self.impl)
        check_drop(self.capacity_factor, self.drop_policy)
        by_position = self.capacity_factor is not None and self.drop_policy == "position"
        if self.pad_to_capacity and not by_position:
            raise ValueError(
                "pad_to_capacity needs a capacity_factor and drop_policy 'position', got"
                f" {self.capacity_factor} and {self.drop_policy!r}: padding needs a size"
            )


def check_drop(capacity_factor: float | None, drop_policy: str) -> None:
    """Raise ValueError for a capacity factor or policy that the router does not know."""
    if capacity_factor is not None and not 0 < capacity_factor < math.inf:
        raise ValueError(
            f"capacity_factor must be > 0, or None for dropless routing, got {capacity_factor}"
        )
    if drop_policy not in get_args(DropPolicy):
        raise ValueError(f"drop_policy must be one of {get_args(DropPolicy)}, got {drop_policy!r}")
