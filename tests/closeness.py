"""How close is close enough: derived, never set by hand.

``assert_equal_to_rounding``: fp64 results of the same arithmetic in another order of summation.
``assert_within_budget``: a fast path against the fp64 oracle. Its error may be at most twice the
error of an honest implementation of the same precision, plus one rounding of the result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in fp64; absolute where the expected is zero."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), "actual has a NaN or an infinity"
    norm = expected.norm().item()
    return (actual - expected).norm().item() / (norm if norm > 0 else 1.0)


def assert_equal_to_rounding(
    actual: Tensor, expected: Tensor, *, tolerance: float = 1e-10, what: str = "tensor"
) -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3e} > {tolerance:.1e}"


def assert_within_budget(
    actual: Tensor,
    oracle: Tensor,
    honest: Tensor,
    *,
    factor: float = 2.0,
    terms: Tensor | None = None,
    what: str = "tensor",
) -> None:
    """RMS and largest error of ``actual`` against ``oracle``, measured by those of ``honest``.

    Args:
        actual: the fast path's result, in its own precision.
        oracle: the fp64 result.
        honest: an eager implementation's result in the precision of ``actual``.
        factor: how many times the honest error is allowed.
        terms: sizes of the terms whose sum the result is, where they cancel: the one rounding is
            of these. By default of the result itself.
        what: named in the message.
    """
    assert actual.shape == oracle.shape == honest.shape
    assert oracle.dtype == torch.float64
    assert actual.isfinite().all(), f"{what} has a NaN or an infinity"
    error, budget = (actual.double() - oracle).abs(), (honest.double() - oracle).abs()
    rounding = torch.finfo(actual.dtype).eps
    terms = oracle if terms is None else terms.double()
    for name, norm in (("rms", lambda t: t.square().mean().sqrt()), ("max", lambda t: t.max())):
        allowed = factor * norm(budget) + rounding * norm(terms.abs())
        assert norm(error) <= allowed, (
            f"{what}: {name} error {norm(error):.3e} > {allowed:.3e}"
            f" ({factor} x {norm(budget):.3e} + one rounding)"
        )
