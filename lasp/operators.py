"""Operators of ``torch.ops.lasp``: what the Triton kernels are to a compiler.

Registered with torch's plain library interface. ``torch.library.custom_op`` loads the compiler at
its first call, and ``torch.library.register_autograd`` reads the schema argument by argument in
every call: that took longer than all the rest of a call on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lasp", "FRAGMENT")


def define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Add an operator.

    Args:
        schema: name, arguments without defaults, and results.
        function: computes it.
        fake: results of the right shapes, whatever is in them.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lasp::{name}", fake, lib=_LIBRARY)


def differentiate(
    name: str,
    gradients: Callable[..., tuple[Tensor | None, ...]],
    save: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Give an operator its gradients.

    Args:
        name: of the operator.
        gradients: of context and gradients of the results, to those of the arguments.
        save: of context, arguments and results, puts into the context what ``gradients`` reads.
    """
    operator = getattr(torch.ops.lasp, name).default

    def forward(ctx: Any, *arguments: Any) -> Any:
        results = below_autograd(*arguments)
        save(ctx, arguments, results)
        return results

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(f"lasp_{name}", (torch.autograd.Function,), methods)

    def with_autograd(*arguments: Any) -> Any:
        wanted = (isinstance(x, Tensor) and x.requires_grad for x in arguments)
        if torch.is_grad_enabled() and any(wanted):
            return function.apply(*arguments)  # type: ignore[attr-defined]
        return below_autograd(*arguments)

    _LIBRARY.impl(name, with_autograd, "Autograd")


def refuse_second_derivative(name: str, instead: str) -> None:
    """Of an operator that computes gradients: its own raise RuntimeError, and say what to use."""

    def gradients(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"gradients of the triton kernels cannot be differentiated: use {instead}"
        )

    differentiate(name, gradients, save=lambda *_: None)
