"""Operators of ``torch.ops``: what kernels and collectives are to a compiler and a checkpoint.

Registered with torch's plain library interface. ``torch.library.custom_op`` loads the compiler at
its first call, and ``torch.library.register_autograd`` reads the schema argument by argument in
every call: that took longer than all the rest of a call on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

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
        self._calls: dict[str, Callable[..., Any]] = {}
        self._numbers_of_tensors: dict[str, int] = {}  # that come first
        self._library = torch.library.Library(namespace, "FRAGMENT")

    def define(
        self, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Add an operator.

        Args:
            schema: name, arguments without defaults, and results; a tuple holds numbers alone.
                Tensors that may want gradients come first.
            function: computes it; a compiler never looks into it, nor when a graph broke before.
            fake: results of the right shapes, whatever is in them.

        Returns:
            What calls the operator: the function itself where nothing looks at operators. Torch's
            dispatcher takes 20 us to turn a dozen arguments to its kinds and back.
        """
        name = schema.partition("(")[0]
        assert "Tensor[]" not in schema  # _is_plain_call does not look into tuples
        function = outside_graphs(function)
        self._library.define(schema)
        self._library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{self._namespace}::{name}", fake, lib=self._library)
        operator = self._operator(name)

        def call_uncompiled(*arguments: Any) -> Any:
            return (function if _is_plain_call(arguments) else operator)(*arguments)

        def call(*arguments: Any) -> Any:
            return (operator if torch.compiler.is_compiling() else call_uncompiled)(*arguments)

        self._calls[name] = call_uncompiled
        kinds = schema.partition("(")[2].split(", ")
        self._numbers_of_tensors[name] = len([*takewhile(lambda x: x.startswith("Tensor"), kinds)])
        return call

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
            What calls the operator, outside graphs without torch's dispatcher where it can.
        """
        operator, without_gradients = self._operator(name), self._calls[name]
        number = self._numbers_of_tensors[name]

        def below_autograd(*arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return without_gradients(*arguments)

        def forward(ctx: Any, *arguments: Any) -> Any:
            arguments = (*arguments[:-1], *arguments[-1])
            results = below_autograd(*arguments)
            save(ctx, arguments, results)
            return results

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return *gradients(ctx, *grads)[:number], None

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(f"{self._namespace}_{name}", (torch.autograd.Function,), methods)

        def with_autograd(*arguments: Any) -> Any:
            if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # most backwards
                return below_autograd(*arguments)
            tensors = [x for x in arguments[:number] if x is not None]
            refuse_forward_mode(reference, *tensors)
            if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
                refuse_transforms(reference)
                # One tuple: autograd looks at each argument, which takes it 2 us for a dozen.
                return function.apply(*arguments[:number], arguments[number:])  # type: ignore[attr-defined]
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


_TENSORS = frozenset((Tensor, Parameter))
_is_meta = attrgetter("is_meta")
_PLAIN_TYPES = _TENSORS | {int, float, bool, str, tuple, type(None)}


def _is_plain_call(arguments: tuple[Any, ...]) -> bool:
    """Whether torch's dispatcher would do nothing but convert the arguments.

    It does more for a mode, a transform, a trace, a profiler, a subclass of tensors, a tensor
    without values or one that is to be read negated.
    """
    if (
        not _PLAIN_TYPES.issuperset(map(type, arguments))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    tensors = [x for x in arguments if type(x) in _TENSORS]
    return not any(map(_is_meta, tensors)) and not any(map(Tensor.is_neg, tensors))
