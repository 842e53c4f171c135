"""The Megatron-Core versions these adapters are for."""

from __future__ import annotations

import megatron.core

FIRST_VERSION, END_VERSION = (0, 16), (0, 20)
if not FIRST_VERSION <= tuple(map(int, megatron.core.__version__.split(".")[:2])) < END_VERSION:
    raise ImportError(
        f"megatron-core must be >= 0.16 and < 0.20, got {megatron.core.__version__}: install one of"
        " these, pip install 'lasp-plus[megatron]'"
    )
