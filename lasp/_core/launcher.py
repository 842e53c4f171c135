"""Launches of Triton kernels that cost the host little more than the launch.

``kernel[grid](...)`` binds every argument by its name, looks at its type, value and address, and
finds the compiled kernel by a string of all that: more than twice the time of the launch itself.
Callers here know beforehand what a kernel is compiled for. They hold one :class:`Launcher` for each
such case, which goes through Triton once and then straight to the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from functools import lru_cache
from inspect import getclosurevars
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16  # bytes: what Triton asks of an address to load many elements at once


class Tile(NamedTuple):
    """How the copy engine is to see a tensor, but for its address.

    Attributes:
        shape: of the tensor.
        strides: in elements, the last one 1, the others multiples of 16 bytes.
        block: elements that a kernel loads or stores at once.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


class Launcher:
    """One kernel for calls that need the same compiled kernel; see :func:`launcher_of`."""

    def __init__(self, kernel: Any, device: torch.device, named: dict[str, Any]) -> None:
        self._kernel, self._device, self._named = kernel, device, named
        self._compiled: CompiledKernel | None = None
        self._rest: tuple[Any, ...] = ()  # of the arguments, by position
        self._stream_of: Callable[[int | None], int] | None = None
        self._encoders: list[Encoder] = []  # for each tensor descriptor
        self._run: Callable[..., object] | None = None

    def __call__(self, programs: int, *arguments: Any, encoded: list[Any] | None = None) -> None:
        """Launch.

        Args:
            programs: of the grid, which has one dim; 0 launches nothing.
            arguments: those that differ between calls, the first ones of the kernel. What it takes
                as a tensor descriptor is given as ``(tensor, tile)``.
            encoded: the arguments with addresses for tensors, of callers that have asked for them.
        """
        if programs == 0:
            return
        device = self._device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self(programs, *arguments, encoded=encoded)
            return
        kernel = self._compiled
        if kernel is None:
            self._compile_and_launch(programs, arguments)
            return
        assert self._stream_of is not None
        stream = self._stream_of(device.index)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        head = programs, 1, 1, stream, kernel.function, kernel.packed_metadata
        # Chains of hooks that hold none are left out: a profiler may add one at any time.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            arguments = (*_described(self._kernel, arguments), *self._rest)
            metadata = kernel.launch_metadata((programs, 1, 1), stream, *arguments)
            kernel.run(*head, metadata, enter, leave, *arguments)
            return
        assert self._run is not None
        encoded = self._encoded(arguments) if encoded is None else encoded
        self._run(*head, None, None, None, *encoded, *self._rest)

    def _encoded(self, arguments: tuple[Any, ...]) -> list[Any]:
        """The arguments as Triton's launch function takes them.

        Addresses, for it asks the driver about each tensor.
        """
        encoders = iter(self._encoders)
        encoded: list[Any] = []
        for x in arguments:
            if isinstance(x, Tensor):  # parameters too
                encoded.append(x.data_ptr())
            elif type(x) is tuple:
                encoded += encode(x[0].data_ptr(), x[1], next(encoders))
            else:
                encoded.append(x)
        return encoded

    def _compile_and_launch(self, programs: int, arguments: tuple[Any, ...]) -> None:
        kernel = self._kernel[(programs,)](*_described(self._kernel, arguments), **self._named)
        if isinstance(kernel, CompiledKernel):  # None where kernels are interpreted
            names = self._kernel.arg_names[len(arguments) :]
            self._rest = tuple(self._named[name] for name in names)
            self._stream_of = driver.active.get_current_stream
            self._run, self._encoders = _below_descriptors(kernel)
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


def launch(kernel: Any, device: torch.device, programs: int, *arguments: Any, **named: Any) -> None:
    """Launch a kernel whose tensors may begin anywhere: their dtypes and places make the case.

    Args:
        kernel: see :func:`launcher_of`.
        device: likewise.
        programs: see :meth:`Launcher.__call__`.
        arguments: likewise, without descriptors.
        named: see :func:`launcher_of`.
    """
    case: list[Any] = []
    encoded: list[Any] = []
    for x in arguments:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            case.append((x.dtype, address % ALIGNMENT == 0))
            encoded.append(address)
        else:
            case.append(type(x))
            encoded.append(x)
    launcher_of(kernel, device, tuple(case), **named)(programs, *arguments, encoded=encoded)


def strides_of(dims: str, **strides: tuple[int, ...]) -> dict[str, int]:
    """Strides of the first dims of tensors, by the names of kernels: ``query_stride_t``."""
    return {
        f"{name}_stride_{dim}": stride
        for name, of_tensor in strides.items()
        for dim, stride in zip(dims, of_tensor)
    }


def aligned(x: Tensor) -> Tensor:
    """``x``, or a contiguous copy of it that begins at a multiple of 16 bytes."""
    if x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# ---- tensor descriptors -------------------------------------------------------------------------

Encoder = Callable[[TensorDescriptor], list[Any]]


def _described(kernel: Any, arguments: tuple[Any, ...]) -> list[Any]:
    """Arguments as Triton's ``kernel[grid]`` takes them."""
    in_gluon = getattr(kernel, "is_gluon", bool)()  # those name the layout of a tile
    return [
        (_in_gluon if in_gluon else TensorDescriptor)(x[0], *x[1]) if type(x) is tuple else x
        for x in arguments
    ]


def _in_gluon(
    x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> GluonDescriptor:
    """A descriptor whose tiles lie as matrix products read them."""
    layout = NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(x.dtype)[6:]))
    return GluonDescriptor(x, list(shape), list(strides), list(block), layout)


class _Address(NamedTuple):
    """Stands for a tensor where only its address matters."""

    address: int

    def data_ptr(self) -> int:
        return self.address


@lru_cache(maxsize=8192)  # of half a KiB
def encode(address: int, tile: Tile, encoder: Encoder) -> list[Any]:
    """What Triton's launch function takes for the tensor at an address, seen as ``tile``.

    Mostly a ``CUtensorMap``, which takes the driver 3 us: more than the launch itself, and a
    backward has 12. It follows from these arguments alone and owns no memory. So what is remembered
    is right for whatever tensor lies there later, and allocators give out the same addresses in
    every step.
    """
    descriptor = object.__new__(TensorDescriptor)  # whose checks passed when it was compiled
    descriptor.base = _Address(address)
    descriptor.shape, descriptor.strides, descriptor.block_shape = tile
    return encoder(descriptor)


def _below_descriptors(kernel: CompiledKernel) -> tuple[Callable[..., object], list[Encoder]]:
    """Triton's launcher without the wrapper that encodes descriptors anew, and that for each."""
    metas = getattr(kernel.metadata, "tensordesc_meta", None)
    types = [x for x in kernel.src.signature.values() if str(x).startswith("tensordesc")]
    if not types:
        return kernel.run, []
    run = copy(kernel.run)
    run.launch = getclosurevars(run.launch).nonlocals["launcher"]
    encoders: dict[str, Encoder] = {}  # those of equal form remember together
    forms = [(form, meta) for form, meta in zip(types, metas or [None] * len(types))]
    return run, [encoders.setdefault(repr(form), _encoder(*form)) for form in forms]


def _encoder(form: str, meta: dict[str, Any] | None) -> Encoder:
    """Triton's own wrapper of a launch function, around one that returns what it is given."""
    wrapped = nvidia.wrap_handle_tensordesc(lambda *given: given, {0: form}, [meta])
    before = getattr(nvidia, "_BASE_ARGS_FORMAT_LEN", None)  # Triton 3.6: all arguments in one row
    if before is None:
        return lambda descriptor: wrapped((descriptor,))[0]
    return lambda descriptor: wrapped(*(None,) * before, descriptor)[before:]
