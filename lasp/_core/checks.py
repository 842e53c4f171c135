"""Checks of arguments that several operators have."""

from __future__ import annotations

import math


def checked_scale(scale: float) -> float:
    """The factor of an operator; ValueError unless it is finite."""
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}: leave it out for the default")
    return float(scale)
