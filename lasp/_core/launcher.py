"""Launches of Triton kernels that cost the host little more than the launch.

``kernel[grid](...)`` binds every argument by its name, looks at its type, value and address, and
finds the compiled kernel by a string of all that: more than twice the time of the launch itself.
Callers here know beforehand what a kernel is compiled for. They hold one :class:`Launcher` for each
such case, which goes through Triton once and then straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes: what Triton asks of an address to load many elements at once


class Launcher:
    """One kernel for calls that need the same compiled kernel; see :func:`launcher_of`."""

    def __init__(self, kernel: Any, device: torch.device, named: dict[str, Any]) -> None:
        self._kernel, self._device, self._named = kernel, device, named
        self._compiled: CompiledKernel | None = None
        self._rest: tuple[Any, ...] = ()  # of the arguments, by position
        self._stream_of: Callable[[int | None], int] | None = None

    def __call__(self, programs: int, *arguments: Any) -> None:
        """Launch.

        Args:
            programs: of the grid, which has one dim; 0 launches nothing.
            arguments: those that differ between calls, the first ones of the kernel.
        """
        if programs == 0:
            return
        device = self._device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(programs, *arguments)
            return
        kernel = self._compiled
        if kernel is None:
            self._compile_and_launch(programs, arguments)
            return
        assert self._stream_of is not None
        stream = self._stream_of(device.index)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        metadata = None
        # Chains of hooks that hold none are left out: a profiler may add one at any time.
        if not getattr(enter, "calls", enter) and not getattr(leave, "calls", leave):
            enter = leave = None
        else:
            grid = (programs, 1, 1)
            metadata = kernel.launch_metadata(grid, stream, *arguments, *self._rest)
        kernel.run(
            programs, 1, 1, stream, kernel.function, kernel.packed_metadata, metadata, enter, leave,
            *arguments, *self._rest,
        )  # fmt: skip

    def _compile_and_launch(self, programs: int, arguments: tuple[Any, ...]) -> None:
        kernel = self._kernel[(programs,)](*arguments, **self._named)
        if isinstance(kernel, CompiledKernel):  # None where kernels are interpreted
            names = self._kernel.arg_names[len(arguments) :]
            self._rest = tuple(self._named[name] for name in names)
            self._stream_of = driver.active.get_current_stream
            self._compiled = kernel


@lru_cache(maxsize=4096)
def launcher_of(kernel: Any, device: torch.device, case: Hashable, **named: Any) -> Launcher:
    """The launcher of a kernel for one case; the last ones are remembered.

    Tensors of its calls begin at a multiple of 16 bytes (:func:`aligned`), integers that differ
    between calls are of ``do_not_specialize``.

    Args:
        kernel: compiled by ``triton.jit``.
        device: of its tensors.
        case: what else it is compiled for: dtypes of tensors, which of them are None or described.
        named: the other arguments of the kernel, and how to compile it.
    """
    return Launcher(kernel, device, named)


def strides_of(dims: str, **tensors: Tensor) -> dict[str, int]:
    """Strides of the first dims of tensors, by the names of kernels: ``query_stride_t``."""
    return {
        f"{name}_stride_{dim}": stride
        for name, x in tensors.items()
        for dim, stride in zip(dims, x.stride())
    }


def aligned(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy of it that begins at a multiple of 16 bytes."""
    if x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def described(
    x: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> TensorDescriptor:
    """``TensorDescriptor(x, shape, strides, block)`` of what was checked when it was planned.

    Its own checks take longer than the launcher does to read it.
    """
    descriptor = object.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape = x, shape
    descriptor.strides, descriptor.block_shape = strides, block
    return descriptor
