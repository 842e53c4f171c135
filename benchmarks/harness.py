"""Rows of measurements: what was measured, where, and against which bound."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench, do_bench_cudagraph


def measure_ms(fn: Callable[[], Any]) -> tuple[float, float, float]:
    """p20, p50 and p80 of the time of ``fn`` on the device."""
    p20, p50, p80 = do_bench(fn, warmup=20, rep=100, quantiles=[0.2, 0.5, 0.8])
    return p20, p50, p80


def graph_ms(fn: Callable[[], Any]) -> tuple[float, float, float]:
    """As ``measure_ms``, of calls captured in a CUDA graph: no time of the host in it."""
    p20, p50, p80 = do_bench_cudagraph(fn, rep=50, quantiles=[0.2, 0.5, 0.8])
    return p20, p50, p80


def copy_bytes_per_s() -> float:
    """Bandwidth of a device copy of 4 GiB, bytes read plus bytes written."""
    source = torch.empty(2**32, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / measure_ms(lambda: target.copy_(source))[1] * 1e3


def environment(commit: str) -> dict[str, Any]:
    """The part of a row that is the same for all rows of a run."""
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "num_devices": 1,
        "driver": driver,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "nccl": None,
    }


def write_rows(rows: list[dict[str, Any]], folder: Path) -> Path:
    """Append to ``<device>-<date>-<commit>.jsonl``, one row a line."""
    first = rows[0]
    device = first["device"].lower().replace(" ", "-")
    path = folder / f"{device}-{first['date']}-{first['commit'][:10]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return path
