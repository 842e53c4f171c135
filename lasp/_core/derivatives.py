"""Derivatives that an operator does not have: each is an error, none is left out without a word.

Every operator has a backward that runs once. ``torch.autograd.function.once_differentiable`` does
not say so: where the gradients that come in need none themselves it ends the graph without a word,
and else it raises only if ``backward`` is called; ``autograd.grad`` of a gradient, as in a penalty
on it, leaves its part out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backward = Callable[..., tuple[Tensor | None, ...]]


class Reference(NamedTuple):
    """Where an operator's missing derivatives are.

    Attributes:
        operator: as users know it.
        instead: computes the same and has derivatives of every order and mode.
    """

    operator: str
    instead: str


def refuse_forward_mode(reference: Reference, *tensors: Tensor | None) -> None:
    """Raise RuntimeError if a tensor has a tangent, as in ``torch.func.jvp`` and dual tensors.

    Kernels and collectives would drop it, and the derivative would be zero. Where no forward-mode
    AD is going on this looks at one number.
    """
    if forward_ad._current_level >= 0 and any(x is not None and has_tangent(x) for x in tensors):
        raise RuntimeError(
            f"{reference.operator} has no forward-mode derivative, got a tensor with a tangent: use"
            f" {reference.instead}, or the backward"
        )


def refuse_transforms(reference: Reference, *tensors: Tensor | None) -> None:
    """Raise RuntimeError for tangents, and in ``torch.func.grad``, ``vjp``, ``jacrev``, ``vmap``.

    For what is an ``autograd.Function``: torch's own error would name nothing that a user called.
    """
    refuse_forward_mode(reference, *tensors)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{reference.operator} does not run in torch.func and torch.vmap, got a call in one of"
            f" their transforms: use torch.autograd.grad or the backward, or {reference.instead}"
        )


def has_tangent(x: Tensor) -> bool:
    """Whether forward-mode AD differentiates by ``x``."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def second_derivative_error(reference: Reference) -> RuntimeError:
    """What the backward of a backward raises."""
    return RuntimeError(
        f"gradients of {reference.operator} cannot be differentiated again: use {reference.instead}"
    )


def refuse_second_derivatives(reference: Reference) -> Callable[[Backward], Backward]:
    """A static ``backward`` whose results raise RuntimeError when they are differentiated.

    They hang on the gradients that come in and on all that the forward has saved: save what the
    gradients depend on, or an :func:`anchor` of it.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():  # as ever, but for gradients of gradients
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            sources = [x for x in (*grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
            if not sources:
                return results
            return tuple(
                x if x is None else _Refusal.apply(reference, x, *sources)  # type: ignore[no-untyped-call]
                for x in results
            )

        return once

    return decorate


def anchor(x: Tensor) -> Tensor:
    """Nothing of ``x`` but its place in the graph, without holding its memory."""
    return x[:0].clone()


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reference: Reference, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.reference = reference
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise second_derivative_error(ctx.reference)
