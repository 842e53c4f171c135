"""A backward in which every rank of a group takes part.

What a rank computes may depend on what another one holds: attention to keys, states, rows of
tokens. The gradient of that comes back from the rank that computed with it, also where this rank
asks for no gradient itself: of a frozen model only the rank whose tokens hold an image may train
the projector. Ranks do not know of each other what requires a gradient, and do not ask in a layer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.derivatives import has_tangent


def join_backward(group: dist.ProcessGroup | None, x: Tensor, *others: Tensor | None) -> Tensor:
    """``x``, which requires a gradient if another rank's tensors may.

    An operator whose backward communicates calls this with its inputs. Over more than one rank its
    results then require a gradient whenever gradients are enabled, on every rank: what a loss makes
    of them reaches the operator, which serves the others. So layers that no rank trains, nor
    anything below them, cost a backward unless they run under ``torch.no_grad()``. A reentrant
    checkpoint hides all this from its caller: use ``use_reentrant=False``. ``torch.compile`` breaks
    the graph where ``x`` is made to require a gradient; with ``fullgraph=True`` it raises there.

    Args:
        group: the ranks of the operator; None: one.
        x: an input.
        others: more of them; where one requires a gradient, ``x`` is returned as it is.
    """
    if x.requires_grad or group is None or not torch.is_grad_enabled():
        return x
    if any(other is not None and other.requires_grad for other in others) or group.size() == 1:
        return x
    if has_tangent(x):  # which detach() drops; the operator refuses it
        return x
    return x.detach().requires_grad_()
