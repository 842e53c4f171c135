"""Backwards that can be run once, and say so.

``torch.autograd.function.once_differentiable`` does not: where the gradients that come in need none
themselves it ends the graph without a word, and else it raises only if ``backward`` is called; for
``autograd.grad`` of a gradient, say a penalty on it, it leaves its part out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def refuse_second_derivatives(backward: Backward) -> Backward:
    """A static ``backward`` whose results raise RuntimeError when they are differentiated.

    They hang on the gradients that come in and on all that the forward has saved: save what the
    gradients depend on, or an :func:`anchor` of it.
    """

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        sources = [
            x for x in (*grads, *ctx.saved_tensors) if isinstance(x, Tensor) and x.requires_grad
        ]
        if not sources:
            return results
        return tuple(x if x is None else _Refusal.apply(x, *sources) for x in results)  # type: ignore[no-untyped-call]

    return once


def anchor(x: Tensor) -> Tensor:
    """Nothing of ``x`` but its place in the graph, without holding its memory."""
    return x[:0].clone()


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "gradients of the experts cannot be differentiated again: use"
            " moe_parallel.reference.reference_moe"
        )
