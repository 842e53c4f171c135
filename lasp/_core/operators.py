"""Operators of ``torch.ops``: what kernels and collectives are to a compiler and a checkpoint.

Registered with torch's plain library interface. ``torch.library.custom_op`` loads the compiler at
its first call, and ``torch.library.register_autograd`` reads the schema argument by argument in
every call: that took longer than all the rest of a call on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lasp._core.derivatives import (
    Reference,
    refuse_forward_mode,
    refuse_transforms,
    second_derivative_error,
)
from lasp._core.graphs import outside_graphs


class Operators:
    """Adds operators to ``torch.ops.<namespace>``."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._library = torch.library.Library(namespace, "FRAGMENT")

    def define(self, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
        """Add an operator.

        Args:
            schema: name, arguments without defaults, and results.
            function: computes it; a compiler never looks into it, nor when a graph broke before.
            fake: results of the right shapes, whatever is in them.
        """
        name = schema.partition("(")[0]
        self._library.define(schema)
        self._library.impl(name, outside_graphs(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self._namespace}::{name}", fake, lib=self._library)

    def differentiate(
        self,
        name: str,
        gradients: Callable[..., tuple[Tensor | None, ...]],
        save: Callable[[Any, tuple[Any, ...], Any], None],
        reference: Reference,
    ) -> Callable[..., Any]:
        """Give an operator its gradients; forward-mode AD and torch.func raise RuntimeError.

        Args:
            name: of the operator.
            gradients: of context and gradients of the results, to those of the arguments.
            save: of context, arguments and results, puts into the context what ``gradients`` reads.
            reference: has the derivatives that are missing here.

        Returns:
            What calls the operator. Outside graphs it saves one of the two ways through torch's
            dispatcher, to gradients and to the function itself.
        """
        operator = self._operator(name)
        below_autograd = _below_autograd(operator)

        def forward(ctx: Any, *arguments: Any) -> Any:
            results = below_autograd(*arguments)
            save(ctx, arguments, results)
            return results

        methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        function = type(f"{self._namespace}_{name}", (torch.autograd.Function,), methods)

        def with_autograd(*arguments: Any) -> Any:
            tensors = [x for x in arguments if isinstance(x, Tensor)]
            refuse_forward_mode(reference, *tensors)
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                refuse_transforms(reference)
                return function.apply(*arguments)  # type: ignore[attr-defined]
            return below_autograd(*arguments)

        self._library.impl(name, with_autograd, "Autograd")

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                return operator(*arguments)
            return with_autograd(*arguments)

        return call

    def refuse_second_derivatives(self, name: str, reference: Reference) -> Callable[..., Any]:
        """Make the gradients of an operator that computes gradients raise RuntimeError.

        Returns:
            What calls the operator, as of :meth:`differentiate`.
        """

        def gradients(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
            raise second_derivative_error(reference)

        return self.differentiate(name, gradients, lambda *_: None, reference)

    def _operator(self, name: str) -> Callable[..., Any]:
        operator: Callable[..., Any] = getattr(getattr(torch.ops, self._namespace), name).default
        return operator


def _below_autograd(operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call
