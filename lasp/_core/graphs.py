"""What ``torch.compile`` must not look into, and what it cannot know."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(fn: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable`` that does not load the compiler where nobody compiles.

    Loading it takes seconds, and process groups that exist at that moment are never freed: their
    threads may then abort a rank that has already finished.
    """
    disabled: list[Callable[P, R]] = []

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(fn))
        return disabled[0](*args, **kwargs)

    return call


def makes_fake_tensors() -> bool:
    """Whether tensors that are made now are fake, under FakeTensorMode: shapes without values.

    Not what Dynamo makes of the code that it looks into.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def data_dependent_size() -> torch.SymInt:
    """In the fake of an operator: a size that depends on what is in a tensor.

    ``torch.library.get_ctx().new_dynamic_size()`` refuses without ``fullgraph=True``, which breaks
    the graph at the operator, and the compiler goes on to trace what launches the kernels. An
    unbacked size needs no such permission where the user never sees the tensor that has it.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv, _constrain_range_for_size

    shapes = torch.library.get_ctx()._shape_env
    assert isinstance(shapes, ShapeEnv)
    size = shapes.create_unbacked_symint()
    _constrain_range_for_size(size, min=0)
    return size
