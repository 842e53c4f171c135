"""What ``torch.compile`` must not look into."""

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
