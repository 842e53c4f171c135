"""What the kernels take, and what a device offers them."""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from lasp.lightning.triton import tuning
from lasp.lightning.triton.chunk_scan_kernel import output_kernel

MAX_HEAD_DIM = 256


def check_inputs(q: Tensor, v: Tensor) -> None:
    """Raise ValueError for what the kernels of the attention do not do."""
    check_tensor("q", q)
    for name, dim in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if dim > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim up to {MAX_HEAD_DIM} for impl='triton', got {dim}:"
                " use impl='eager'"
            )


def check_tensor(name: str, x: Tensor) -> None:
    """Raise ValueError for a dtype or a device that no kernel takes."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"{name} must be bf16, fp16 or fp32 for impl='triton', got {x.dtype}: use impl='eager'"
        )
    compiled = isinstance(output_kernel, triton.JITFunction)
    if compiled and x.device.type != "cuda":
        raise ValueError(
            f"{name} must be on a GPU for impl='triton', got {x.device}: use impl='eager', or set"
            " TRITON_INTERPRET=1 before triton is imported to interpret the kernels"
        )


@cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory of a program."""
    if device.type != "cuda":  # interpreted
        return 1, tuning.HOPPER_SHARED_BYTES
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"] - 7 * 1024


def arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """What matrix products take: fp16 goes as tf32, which has its digits and the range of states.

    ``tf32x3`` adds three tf32 products of high and low parts. Left out is that of the two low
    parts, 2^-22 of a product: four roundings of float32.
    """
    if dtype == torch.bfloat16:
        return {"OPERAND": triton.language.bfloat16, "PRECISION": "ieee"}
    precision = "tf32" if dtype == torch.float16 else "tf32x3"
    return {"OPERAND": triton.language.float32, "PRECISION": precision}
