"""What a device offers to the kernels, and how they multiply."""

from __future__ import annotations

from functools import cache

import torch
import triton

from lasp.lightning.triton import tuning


@cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory of a program."""
    if device.type != "cuda":  # interpreted
        return 1, tuning.HOPPER_SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"] - tuning.KEPT_BY_TRITON


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the kernels for Hopper run there: compute capability 9.0, compiled."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """What matrix products take: fp16 goes as tf32, which has its digits and the range of states.

    ``tf32x3`` adds three tf32 products of high and low parts. Left out is that of the two low
    parts, 2^-22 of a product: four roundings of float32.
    """
    if dtype == torch.bfloat16:
        return {"OPERAND": triton.language.bfloat16, "PRECISION": "ieee"}
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return {"OPERAND": triton.language.float32, "PRECISION": precision}
