"""What importing costs, and what it must not need."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("package", ["lasp", "lasp.layout", "ring", "moe_parallel", "lasp.hybrid"])
def test_import_needs_neither_triton_nor_megatron(package: str) -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'megatron', 'matplotlib', 'rich', 'tyro'):\n"
        "    sys.modules[name] = None\n"
        f"import {package}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_self_check_runs_and_finds_nothing_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lasp"], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if "largest difference" in line]
    assert [line.split()[0] for line in lines] == [
        "lightning_attention",
        "ring_attention",
        "ExpertParallelMoE",
    ]


def test_import_is_light() -> None:
    code = (
        "import time, torch, torch.distributed\n"
        "start = time.process_time()\n"
        "import lasp, ring, moe_parallel\n"
        "print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0  # seconds beyond torch
