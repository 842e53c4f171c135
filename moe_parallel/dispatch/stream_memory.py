"""What copy engines and front ends of GPUs do on a stream, without a multiprocessor.

PyTorch copies tensors, and has no operation that lets a stream wait for a number in memory: its
barriers of symmetric memory are kernels that poll. A polling block is one multiprocessor less for a
product beside it, whose last tiles then take another round (308 us became 355 at 1024 rows).
So these three are calls of the CUDA driver; a CUDA graph captures them.
"""

from __future__ import annotations

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


class CudaStreamMemory:
    """Calls of the CUDA driver, for the current device.

    Raises:
        ImportError: without the package ``cuda-bindings``, which torch's CUDA wheels depend on.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise ImportError(
                "SymmetricMemory needs the package cuda-bindings, on which torch's CUDA wheels"
                " depend: pip install cuda-bindings"
            ) from error
        self._driver = driver

    def copy(self, to: int, source: int, num_bytes: int, stream: Any) -> None:
        """See :class:`StreamMemory`."""
        (code,) = self._driver.cuMemcpyAsync(to, source, num_bytes, stream.cuda_stream)
        if code:
            raise RuntimeError(f"the CUDA driver says {code!r}")

    def prepared(self, operations: Sequence[SignalOperation]) -> Prepared:
        """See :class:`StreamMemory`."""
        kinds, driver, found = self._driver.CUstreamBatchMemOpType, self._driver, []
        for kind, address, value in operations:
            parameters = driver.CUstreamBatchMemOpParams()
            if kind == "wait":
                place = parameters.waitValue
                place.operation = kinds.CU_STREAM_MEM_OP_WAIT_VALUE_32
                place.flags = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_EQ.value
            else:  # which fences what the stream held before
                place = parameters.writeValue
                place.operation = kinds.CU_STREAM_MEM_OP_WRITE_VALUE_32
                place.flags = driver.CUstreamWriteValue_flags.CU_STREAM_WRITE_VALUE_DEFAULT.value
            place.address, place.value = address, value
            found.append(parameters)
        return found

    def run(self, operations: Prepared, stream: Any) -> None:
        """See :class:`StreamMemory`."""
        call = self._driver.cuStreamBatchMemOp
        (code,) = call(stream.cuda_stream, len(operations), operations, 0)
        if code:
            raise RuntimeError(f"the CUDA driver says {code!r}")
