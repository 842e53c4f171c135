"""Attention sinks: one more logit a head in the denominator of the softmax, with no value.

With the lse of a row over its keys, and the sink s of the head::

    lse' = log(exp(lse) + exp(s))      o' = o exp(lse - lse')

Then exp(score - lse') are the probabilities of the keys, and a backward that gets o' and lse' is
exact as it is: no kernel knows sinks. The sink has the probability p = exp(s - lse') and its score
the gradient p (dlse' - do' . o'), as every score has with a value of zero.

Source: gpt-oss; Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
arXiv:2309.17453.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ring.blocks.merge import Partial

ROWS_AT_ONCE = 4096  # whose products are in memory in float32


def add_sinks(partial: Partial, sinks: Tensor) -> Partial:
    """Rows with the sinks ``[Hq]``; the output is scaled in place."""
    lse_TH = torch.logaddexp(partial.lse, sinks.to(partial.lse.dtype))
    share_TH1 = (partial.lse - lse_TH).exp_().unsqueeze(-1)
    return Partial(partial.output.mul_(share_TH1), lse_TH)


def sink_gradients(
    sinks: Tensor, doutput: Tensor, dlse: Tensor | None, output: Tensor, lse: Tensor
) -> Tensor:
    """Gradient to the sinks ``[Hq]`` from the rows of this rank, summed in the dtype of the lse."""
    rows = zip(doutput.split(ROWS_AT_ONCE), output.split(ROWS_AT_ONCE))
    delta_TH = torch.cat([(do.to(lse.dtype) * o).sum(-1) for do, o in rows])
    dscore_TH = -delta_TH if dlse is None else dlse - delta_TH
    return (dscore_TH * (sinks - lse).exp()).sum(0).to(sinks.dtype)
