"""Operators: when their function is called in place of torch's dispatcher, and when not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lasp._core.derivatives import Reference
from lasp._core.operators import Operators

TIMES: list[Any] = []  # as the function got them: the dispatcher makes them floats


def multiply(x: Tensor, times: float) -> Tensor:
    """Reads memory as kernels do, which know nothing of bits of a tensor."""
    TIMES.append(times)
    memory = x.detach().clone() if not x.is_neg() else -x.detach().clone()
    return memory * times


_OPERATORS = Operators("lasp_test")
direct = _OPERATORS.define(
    "multiply(Tensor x, float times) -> Tensor", multiply, lambda x, times: torch.empty_like(x)
)
call = _OPERATORS.differentiate(
    "multiply", lambda ctx, grad: (grad, None), lambda *_: None, Reference("multiply", "mul")
)
PAIRS: list[Any] = []


def keep(x: Tensor, pair: Any) -> Tensor:
    PAIRS.append(pair)
    return x.clone()


pair = _OPERATORS.define(
    "keep(Tensor x, int[2] pair) -> Tensor", keep, lambda x, pair: torch.empty_like(x)
)
CALLERS = pytest.mark.parametrize("caller", [direct, call])


class Names(TorchDispatchMode):
    """The operators that a block calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A tensor that is asked about functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return str(func)


@CALLERS
@pytest.mark.parametrize("x", [torch.ones(3), torch.nn.Parameter(torch.ones(3))])
def test_a_plain_call_does_without_the_dispatcher(caller: Any, x: Tensor) -> None:
    with torch.no_grad():
        result = caller(x, 2)
    assert type(TIMES[-1]) is int
    assert result.tolist() == [2, 2, 2]


def test_a_tuple_of_numbers_is_plain() -> None:
    """As the window of ring attention; the dispatcher would make it a list."""
    PAIRS.clear()
    pair(torch.ones(3), (2, 3))
    assert PAIRS == [(2, 3)]


def test_gradients_are_those_of_the_operator() -> None:
    x = torch.ones(3, requires_grad=True)
    call(x, 2).sum().backward()
    assert type(TIMES[-1]) is int
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 1]


@CALLERS
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_whoever_looks_at_operators_sees_this_one(caller: Any) -> None:
    x = torch.ones(3)
    with Names() as mode:
        caller(x, 2)
    assert "lasp_test.multiply.default" in mode.names
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        caller(x, 2)
    assert "lasp_test::multiply" in {event.key for event in profiler.key_averages()}
    assert "multiply" in caller(x.as_subclass(Named), 2)
    traced = torch.jit.trace(lambda x: caller(x, 2), x)
    assert "lasp_test::multiply" in str(traced.graph)


@CALLERS
def test_tensors_whose_memory_is_not_what_they_say_go_through_the_dispatcher(caller: Any) -> None:
    negated = torch.tensor([1 + 2j]).conj().imag
    assert negated.is_neg()
    assert caller(negated, 2).tolist() == [-4]
    assert caller(torch.ones(3, device="meta"), 2).is_meta
