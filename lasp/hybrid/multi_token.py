"""Multi-token prediction: one more layer that predicts the token after the next.

Source: DeepSeek-V3, arXiv:2412.19437, section 2.2, at depth 1; Ling and Ring have the same layer.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lasp._core.checks import check_part, checked_rank
from lasp._core.collectives import all_gather
from lasp.hybrid.config import HybridConfig
from lasp.hybrid.layer import HybridLayer, LayerOutput, draw_xavier
from lasp.hybrid.packing import PackedBatch
from lasp.layers.rms_norm import RMSNorm
from lasp.sequence.layout import SequenceLayout
from moe_parallel import ParallelGroups, SymmetricMemory


class MultiTokenLayer(nn.Module):
    """``final_norm(layer(projection [token_norm(e), hidden_norm(h)]))``.

    Here h is the model's output before the head, e the embedding of the token that follows, and
    ``layer`` a softmax layer, with experts if the model has some. The head is the model's.
    """

    def __init__(
        self,
        config: HybridConfig,
        *,
        groups: ParallelGroups,
        symmetric_memory: SymmetricMemory | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        alone = replace(
            config,
            num_layers=1,
            pattern="*",
            decay="minimax",  # not read: there may be rates of other layers
            dense=None if config.moe else config.dense,
            residuals=config.residuals_or_deepnorm,
        )
        size = config.hidden_size
        self.token_norm, self.hidden_norm, self.final_norm = (
            RMSNorm(size, config.norm_eps, impl=config.lightning_impl, device=device, dtype=dtype)
            for _ in range(3)
        )
        self.projection = nn.Linear(2 * size, size, bias=False, device=device, dtype=dtype)
        self.layer = HybridLayer(
            alone, 0, groups=groups, symmetric_memory=symmetric_memory, device=device, dtype=dtype
        )

    def forward(self, hidden: Tensor, embedded: Tensor, batch: PackedBatch) -> LayerOutput:
        """``hidden`` and ``embedded`` ``[T, hidden_size]``: h and e of this rank's tokens."""
        both = torch.cat((self.token_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        output: LayerOutput = self.layer(self.projection(both), batch)
        return LayerOutput(self.final_norm(output.hidden), output.aux_loss, output.stats)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, init_gain: float) -> None:
        """See :meth:`lasp.hybrid.HybridModel.reset_parameters`."""
        draw_xavier(self.projection.weight, 1.0, generator)
        self.layer.reset_parameters(generator, init_gain)


def next_in_document(
    x: Tensor, layout: SequenceLayout, cp_group: dist.ProcessGroup | None = None, *, pad_value: int
) -> Tensor:
    """What follows each token in its document, wherever that is held.

    The tokens that :class:`MultiTokenLayer` embeds are those after ``tokens``, and its labels those
    after ``labels``, with -100 where there are none.

    Args:
        x: ``[T]`` of this rank, of tokens or labels.
        layout: who holds which tokens.
        cp_group: the ranks that hold the pack. None: one rank.
        pad_value: what the last token of a document gets, and padding.

    Returns:
        Like ``x``.

    Communication: one all-gather of ``x`` over the group.

    Raises:
        ValueError: if ``x`` has not the layout's T tokens, or the group not its ranks; before any
            communication.
    """
    check_part("x", x, Tensor)
    check_part("layout", layout, SequenceLayout)
    check_part("cp_group", cp_group, dist.ProcessGroup, optional=True)
    if x.dim() != 1:
        raise ValueError(f"x must be [T], one number a token, got {list(x.shape)}")
    rank = checked_rank("x", x, 0, layout, cp_group)
    following = layout.unshard(all_gather(x, cp_group).unbind()).roll(-1)
    ends = [end - 1 for end in accumulate(layout.document_lengths) if end > 0]
    following[ends] = pad_value
    return layout.shard(following, rank, pad_value=pad_value)
