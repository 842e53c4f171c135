"""What the stages of the layer share while a call is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_parallel.dispatch import all_to_all as exchange
from moe_parallel.dispatch.permute import RowOrder
from moe_parallel.impl import ChosenImpl
from moe_parallel.router.host_counts import KeptCounts
from moe_parallel.router.token_order import TokenOrder


@dataclass
class Call:
    """What the stages of one call hand on beside the tensors that Megatron passes.

    Attributes:
        order: where the tokens of every rank stand.
        shape: of this rank's hidden states.
        counts: how many assignments each rank keeps for each expert.
        impl: of what lies around the experts.
        plan: who sends how many rows to whom; from ``preprocess`` on.
        rows: which row is whose; from ``preprocess`` on.
        probs: weights of the rows; from ``routed_experts_compute`` on.
    """

    order: TokenOrder
    shape: torch.Size
    counts: KeptCounts
    impl: ChosenImpl
    plan: exchange.ExchangePlan = field(init=False)
    rows: RowOrder = field(init=False)
    probs: Tensor = field(init=False)

    def kept(self, routing_map: Tensor) -> Tensor | None:
        """Which assignments are kept; None for all."""
        return None if self.counts.dropless else routing_map >= 0
