"""Who computes an operator: plain torch or Triton kernels. One rule for all operators."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Impl = Literal["auto", "eager", "triton"]
ChosenImpl = Literal["eager", "triton"]
_IMPLS = get_args(Impl)

HAS_TRITON = find_spec("triton") is not None
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_impl(impl: str, argument: str = "impl") -> None:
    """Raise ValueError for a name that is not offered."""
    if impl not in _IMPLS:
        raise ValueError(f"{argument} must be one of {_IMPLS}, got {impl!r}: use 'auto'")


def chosen_impl(
    impl: Impl, device: torch.device, dtype: torch.dtype, refusal: str = ""
) -> ChosenImpl:
    """The implementation that a call takes.

    ``auto`` is ``triton`` on NVIDIA GPUs of compute capability 8.0 and above, where triton is
    installed and the kernels serve the dtype and the shapes of the call, else ``eager``. The choice
    is made before anything runs: an error of a kernel never leads to the other implementation. An
    explicit name is taken or refused.

    Args:
        impl: the name that the user gave.
        device: where the call computes.
        dtype: of its inputs, under autocast that of autocast.
        refusal: a shape that the kernels of this operator do not serve, as ``a head dim of 300``;
            empty where they serve all shapes of the call.

    Raises:
        ValueError: for an unknown name, and for ``triton`` where it cannot run: without triton, in
            float64, for a refused shape, on a CPU unless ``TRITON_INTERPRET=1`` was set before
            triton was imported.
    """
    if impl == "eager":
        return impl
    if impl == "auto":
        served = device.type == "cuda" and HAS_TRITON and dtype in KERNEL_DTYPES and not refusal
        return "triton" if served and _runs_kernels(device) else "eager"
    check_impl(impl)
    if impl == "triton":
        _check_triton(device, dtype, refusal)
    return impl


@cache
def _runs_kernels(device: torch.device) -> bool:
    """Whether a CUDA device does: ROCm and GPUs older than Ampere do not compile the kernels."""
    if torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _check_triton(device: torch.device, dtype: torch.dtype, refusal: str) -> None:
    if not HAS_TRITON:
        raise ValueError("impl must be 'eager' without triton: install triton for impl='triton'")
    if dtype not in KERNEL_DTYPES or refusal:
        raise ValueError(
            f"impl must be 'auto' or 'eager' for {refusal or dtype}, got 'triton': its kernels take"
            " bf16, fp16 and fp32, and bounded shapes"
        )
    if device.type == "cuda" and not _runs_kernels(device):
        raise ValueError(
            "impl must be 'auto' or 'eager' on this GPU, got 'triton': its kernels are for NVIDIA"
            " GPUs of compute capability 8.0 and above"
        )
    if device.type not in ("cuda", "meta"):
        from lasp._core.interpreter import INTERPRETED  # which imports triton

        if not INTERPRETED:
            raise ValueError(
                f"impl must be 'auto' or 'eager' on {device.type}, got 'triton': move the inputs to"
                " a GPU, or set TRITON_INTERPRET=1 before triton is imported to interpret kernels"
            )
