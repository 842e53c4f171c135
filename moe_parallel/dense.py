"""A layer without experts in the place of one with experts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.autocast import autocast_inputs
from lasp._core.checks import check_part, check_sizes
from moe_parallel.config import MoEConfig
from moe_parallel.experts.dense import DenseFFN
from moe_parallel.experts.shard import generator_of
from moe_parallel.layer import MoEOutput
from moe_parallel.router.checks import check_hidden
from moe_parallel.router.counts import RoutingStats
from moe_parallel.router.losses import TokenSequences
from moe_parallel.router.scores import RoutingReplay
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.topology import ExpertGroups


class DenseLayer(nn.Module):
    """A dense SwiGLU that is called as :class:`moe_parallel.ExpertParallelMoE` is.

    The first layers of DeepSeek's and Ling's models have no experts. Parameters are those of
    :class:`moe_parallel.experts.dense.DenseFFN`, whole on every rank, under ``ffn``.

    Args:
        config: gives ``hidden_size`` and ``impl``; its other fields are not read.
        ffn_size: its FFN width.
        groups: its token group holds the ranks of a ``token_order``; the default is one rank.
        seed: seed of the initial values, the same on every rank; give every layer another.
        device: of the parameters; ``meta`` makes no values.
        dtype: of the parameters and the tokens.

    Communication: none. The caller sums the gradients of parameters over the token group.
    """

    def __init__(
        self,
        config: MoEConfig,
        ffn_size: int,
        *,
        groups: ExpertGroups = ExpertGroups(),  # noqa: B008 (immutable)
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_part("config", config, MoEConfig)
        check_part("groups", groups, ExpertGroups)
        check_sizes(ffn_size=ffn_size)
        self._rank = 0 if groups.token is None else dist.get_rank(groups.token)
        self.ffn = DenseFFN(
            config.hidden_size, ffn_size, impl=config.impl, device=device, dtype=dtype
        )
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int, *, gain: float = 1.0) -> None:
        """Xavier normal values, as of :class:`moe_parallel.ExpertParallelMoE`."""
        self.ffn.reset_parameters(generator_of(seed), gain=gain)

    def forward(
        self,
        hidden: Tensor,
        *,
        token_order: TokenOrder | None = None,
        timeline: object = None,
        replay: RoutingReplay | None = None,
        sequences: TokenSequences | None = None,
    ) -> MoEOutput:
        """The network of every row; no loss, and statistics of no experts.

        Args:
            hidden: ``[T, hidden]`` or ``[B, T, hidden]``.
            token_order: tokens it leaves out are padding, whose output is zero; None: none are.
            timeline: not read.
            replay: not read.
            sequences: not read.

        Raises:
            ValueError: if ``hidden`` does not fit.
        """
        (hidden,) = autocast_inputs(hidden)
        check_hidden(hidden, self.ffn.w13)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if token_order is None:
            output = self.ffn(rows)
        else:
            output = token_order.put(self.ffn(token_order.take(rows, self._rank)), self._rank)
        none = torch.zeros(0, dtype=torch.int64, device=hidden.device)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return MoEOutput(
            output.view_as(hidden), hidden.new_zeros((), dtype=wide), RoutingStats(none, none)
        )
