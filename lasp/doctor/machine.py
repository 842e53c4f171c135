"""What there is: versions, GPUs, the links between them, and variables that change behaviour."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from itertools import permutations
from pathlib import Path

import torch

import lasp
import moe_parallel
import ring

PACKAGES = (
    *("lasp-plus", "torch", "triton", "numpy", "megatron-core", "transformer-engine"),
    *("flash-attn-4", "nvidia-cutlass-dsl", "liger-kernel", "safetensors", "mpi4py"),
)
PREFIXES = ("CUDA_", "GLOO_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTORCH_", "TORCH", "TRITON_")
SECRETS = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL")  # in names: a report is made public
COPY_BYTES, COPIES = 256 * 2**20, 10
GB = 1e9


def versions() -> dict[str, str]:
    """Versions by package, and of what is no package."""
    rows = {"python": platform.python_version(), "system": platform.platform()}
    rows |= {package: _version(package) for package in PACKAGES}
    rows["torch"] = torch.__version__
    rows["CUDA of torch"] = str(torch.version.cuda or torch.version.hip or "none")
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        rows["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    rows["driver"] = _driver()
    rows["cores"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "")
    if Path("/dev/shm").exists():
        rows["free in /dev/shm"] = f"{shutil.disk_usage('/dev/shm').free / GB:.1f} GB"
    places = {Path(str(p.__file__)).parents[1] for p in (lasp, ring, moe_parallel)}
    rows["imported from"] = ", ".join(map(str, sorted(places)))
    if len(places) > 1:
        rows["imported from"] += ": other packages have the names ring or lasp, uninstall them"
    return rows


def _version(package: str) -> str:
    try:
        # None, where an interrupted installation left a folder without metadata.
        return version(package) or "broken, without metadata: reinstall it"
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """The driver that nvidia-smi tells."""
    if (program := shutil.which("nvidia-smi")) is None:
        return "no nvidia-smi"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi failed: {error}"
    return ", ".join(sorted(set(done.stdout.split()))) or done.stderr.strip()


def variables() -> dict[str, str]:
    """Environment variables that change how torch, Triton, NCCL and CUDA behave; no secrets."""
    found = [name for name in os.environ if name.startswith(PREFIXES)]
    return {n: os.environ[n] for n in sorted(found) if not any(word in n for word in SECRETS)}


def gpus() -> list[dict[str, str]]:
    """Name, compute capability and memory of each GPU."""
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        rows.append(
            {
                "gpu": str(index),
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": str(properties.multi_processor_count),
                "memory": f"{free / GB:.1f} of {total / GB:.1f} GB free",
            }
        )
    return rows


def links(*, measure: bool) -> list[dict[str, str]]:
    """Whether each GPU reads the memory of each other, and how fast copies are, if asked."""
    rows = []
    for source, target in permutations(range(torch.cuda.device_count()), 2):
        row = {"from": str(source), "to": str(target)}
        peers = torch.cuda.can_device_access_peer(target, source)
        row["peer access"] = "yes" if peers else "no: copies go through the host"
        if measure:
            row["copies"] = f"{_bandwidth(source, target) / GB:.0f} GB/s"
        rows.append(row)
    return rows


def _bandwidth(source: int, target: int) -> float:
    """Bytes a second of copies from a GPU to another."""
    sent = torch.empty(COPY_BYTES, dtype=torch.uint8, device=f"cuda:{source}")
    received = torch.empty_like(sent, device=f"cuda:{target}")
    received.copy_(sent)  # sets the link up
    with torch.cuda.device(source):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(target)
        start.record()
        for _ in range(COPIES):
            received.copy_(sent, non_blocking=True)
        stop.record()
        stop.synchronize()
    seconds: float = start.elapsed_time(stop) / 1e3
    return COPIES * COPY_BYTES / seconds
