"""The kernels for Hopper are compiled without one: what they need of its registers and memory.

That they compute what the others do is tested on GPUs, by the tests of the operator. They are
compiled in a process of their own. In this one Triton's interpreter may have run a kernel that
calls ``tl.sum`` or another function of Triton's own. It then leaves ``triton.language.core``
patched (``InterpretedFunction.__call__`` does not restore it), and later compilations fail.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton.experimental.gluon", reason="needs Triton with Gluon")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

from lasp.lightning.triton import hopper_scan_kernel as kernels
from lasp.lightning.triton import tuning
from lasp.lightning.triton.hopper_scan_kernel import TILE

RESULT_TILES = ("value", "output_tiles", "q_columns", "do_columns", "dk_tiles", "dv_tiles")
POINTERS = dict.fromkeys(("output", "dk", "dv"), "*bf16")
POINTERS |= dict.fromkeys(("states", "rates"), "*fp32")
POINTERS |= dict.fromkeys(("table", "reach"), "*i32")


def compiled(name: str, dim: int, named: dict[str, object]) -> tuple[str, int]:
    """For compute capability 9.0, without states at edges: the PTX, and bytes of shared memory."""
    kernel = getattr(kernels, name)
    blocks = tuning.hopper_blocks(dim, dim, torch.bfloat16)
    assert blocks is not None
    known = {"STAGES": blocks.stages, "WIDTH": blocks.width, "APART": blocks.apart, **named}
    known |= {"D": dim, "initial_state": None, "incoming": None, "final_state": None}
    names = [parameter.name for parameter in kernel.params]

    def kind(name: str) -> str:
        if name in known:
            return "constexpr"
        if name in POINTERS or name in ("num_heads", "scale"):
            return POINTERS.get(name, "i32" if name == "num_heads" else "fp32")
        width = 64 if name in RESULT_TILES else blocks.width
        return f"tensordesc<bf16[1, 64, {width}],{TILE.value!r}>"

    signature = {name: kind(name) for name in names}
    constants = {(i,): known[name] for i, name in enumerate(names) if name in known}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS}
    result = triton.compile(
        GluonASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4, "maxnreg": blocks.max_registers},
    )
    return result.asm["ptx"], result.metadata.shared


@pytest.mark.parametrize("width", [64, 128])
def test_tiles_are_described_as_the_kernels_read_them(width: int) -> None:
    described = NVMMASharedLayout.get_default_for([1, 64, width], gl.bfloat16)
    assert described == TILE.value


def test_a_kernel_fits_and_its_products_follow_each_other(tmp_path: Path) -> None:
    cases: list[tuple[str, int, dict[str, object]]] = [
        ("hopper_scan_kernel", 128, {"E": 128, "STEP": 1, "TRANSPOSED": False, "SHARED": True}),
        ("hopper_gradients_kernel", 256, {"SHARED": False}),
    ]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        results = list(process.map(compiled, *zip(*cases)))
    for (name, *_), (ptx, shared) in zip(cases, results):
        assert shared <= tuning.HOPPER_SHARED_BYTES + tuning.KEPT_BY_TRITON, name
        (tmp_path / "a.ptx").write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "a.ptx", "-o", "a.cubin"]
        report = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        # Where registers are short, the assembler makes each product wait for the one before.
        assert "serialized" not in report.stderr, name
