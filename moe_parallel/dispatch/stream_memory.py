"""What copy engines and front ends of GPUs do on a stream, without a multiprocessor.

PyTorch copies tensors, and has no operation that lets a stream wait for a number in memory: its
barriers of symmetric memory are kernels that poll. A polling block is one multiprocessor less for a
product beside it, whose last tiles then take another round (308 us became 355 at 1024 rows).
So these three are calls of the CUDA driver; a CUDA graph captures them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

Prepared = Any


class SignalOperation(NamedTuple):
    """An operation on an int32 in memory.

    Attributes:
        kind: ``write`` it after all that the stream held before, for all GPUs to see; or ``wait``
            until it has the value.
        address: in device memory, of any GPU for ``write``.
        value: that it gets or waits for.
    """

    kind: Literal["write", "wait"]
    address: int
    value: int


class StreamMemory(Protocol):
    """Operations on a stream, by address."""

    def copy(self, to: int, source: int, num_bytes: int, stream: Any) -> None:
        """Copy bytes between places in device memory, of any GPU."""

    def prepared(self, operations: Sequence[SignalOperation]) -> Prepared:
        """Operations to :meth:`run` more than once."""

    def run(self, operations: Prepared, stream: Any) -> None:
        """One after another."""


class _SignalParameters(ctypes.Structure):  # CUstreamBatchMemOpParams, the same for both kinds
    _fields_ = (
        ("operation", ctypes.c_uint),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    )


_OPERATIONS = {"wait": 1, "write": 2}  # CU_STREAM_MEM_OP_WAIT_VALUE_32, ..._WRITE_VALUE_32
_FLAGS = {"wait": 1, "write": 0}  # CU_STREAM_WAIT_VALUE_EQ; a write that fences what was before


class CudaStreamMemory:
    """Calls of the CUDA driver, for the current device."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        address, stream, pointer, uint = ctypes.c_uint64, *(ctypes.c_void_p,) * 2, ctypes.c_uint
        self._driver.cuMemcpyAsync.argtypes = (address, address, ctypes.c_size_t, stream)
        self._driver.cuStreamBatchMemOp_v2.argtypes = (stream, uint, pointer, uint)

    def copy(self, to: int, source: int, num_bytes: int, stream: Any) -> None:
        """See :class:`StreamMemory`."""
        self._check(self._driver.cuMemcpyAsync(to, source, num_bytes, stream.cuda_stream))

    def prepared(self, operations: Sequence[SignalOperation]) -> Prepared:
        """See :class:`StreamMemory`."""
        parameters = [
            _SignalParameters(_OPERATIONS[kind], at, value, _FLAGS[kind])
            for kind, at, value in operations
        ]
        return (_SignalParameters * len(operations))(*parameters)

    def run(self, operations: Prepared, stream: Any) -> None:
        """See :class:`StreamMemory`."""
        call = self._driver.cuStreamBatchMemOp_v2
        self._check(call(stream.cuda_stream, len(operations), operations, 0))

    def _check(self, code: int) -> None:
        if code:
            name = ctypes.c_char_p()
            self._driver.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"the CUDA driver says {(name.value or b'?').decode()} ({code})")
