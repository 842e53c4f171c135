"""Calls of the CUDA driver on streams: what can be seen of them without one."""

from __future__ import annotations

import ctypes
import sys
from unittest.mock import patch

import pytest

from moe_parallel.dispatch.stream_memory import CudaStreamMemory, SignalOperation


def test_says_which_package_is_missing() -> None:
    missing = patch.dict(sys.modules, {"cuda.bindings": None})
    with missing, pytest.raises(ImportError, match="SymmetricMemory needs the package cuda-bind"):
        CudaStreamMemory()


def test_operations_are_those_of_the_driver() -> None:
    pytest.importorskip("cuda.bindings", reason="torch's CPU wheels come without cuda-bindings")
    operations = [SignalOperation("wait", 2**40, 1), SignalOperation("write", 2**41 + 4, 0)]
    wait, write = CudaStreamMemory().prepared(operations)

    def fields(parameters: object) -> tuple[int, ...]:
        """Operation, address, value and flags, where the driver reads them."""
        return tuple((ctypes.c_uint64 * 4).from_address(parameters.getPtr()))

    assert fields(wait) == (1, 2**40, 1, 1)  # CU_STREAM_MEM_OP_WAIT_VALUE_32, ..._VALUE_EQ
    assert fields(write) == (2, 2**41 + 4, 0, 0)  # CU_STREAM_MEM_OP_WRITE_VALUE_32, with a fence
