"""Who computes what lies around the matrix products: plain torch or the Triton kernels."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from moe_parallel.config import Impl

ChosenImpl = Literal["eager", "triton"]


def chosen_impl(impl: Impl, device: torch.device, dtype: torch.dtype) -> ChosenImpl:
    """What ``impl`` comes to: ``auto`` is triton on CUDA for all dtypes but float64, else eager.

    Raises:
        ValueError: if the name is unknown, or ``triton`` was asked for and cannot run.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {get_args(Impl)}, got {impl!r}")
    if impl == "auto":
        return "triton" if device.type == "cuda" and dtype != torch.float64 else "eager"
    if impl == "triton":
        from moe_parallel.kernels import launch

        if dtype == torch.float64 or (launch.COMPILED and device.type not in ("cuda", "meta")):
            raise ValueError(
                "impl must be 'eager' for float64 and on CPUs (but for TRITON_INTERPRET=1, set"
                f" before triton is imported), got impl='triton' for {dtype} on {device.type}"
            )
    return impl
