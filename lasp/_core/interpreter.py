"""Whether Triton interprets its kernels in this process. Importing this module imports triton."""

from __future__ import annotations

import triton


def _empty_kernel() -> None:
    pass


INTERPRETED = not isinstance(triton.jit(_empty_kernel), triton.JITFunction)
