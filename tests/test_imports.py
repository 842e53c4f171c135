"""What importing costs, and what it must not need."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "package", ["lasp", "lasp.sequence.layout", "ring", "moe_parallel", "lasp.hybrid"]
)
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


def test_operators_do_not_load_the_compiler_and_free_their_groups() -> None:
    """Groups that exist while torch loads its compiler are never freed (torch 2.11 and 2.13).

    Their threads may then drop a tensor while Python ends, which aborts a rank that had finished.
    """
    code = """
import os, sys, tempfile, time, torch, torch.distributed as dist
from lasp import LightningAttention
from ring import RingAttention
layers = [LightningAttention(8, 2, 4, 0, 2), RingAttention(8, 2, 1, 4, rotary_dim=2)]
x = torch.ones(3, 8)
for layer in layers:
    layer(x).sum().backward()  # threads of torch, that stay
threads = len(os.listdir("/proc/self/task"))
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/f", rank=0, world_size=1)
for layer in layers:
    layer(x, cp_group=dist.group.WORLD).sum().backward()
del layer
dist.destroy_process_group()
deadline = time.monotonic() + 10  # the system lists a thread for a moment after it was joined
while (left := len(os.listdir("/proc/self/task")) - threads) and time.monotonic() < deadline:
    time.sleep(0.01)
print("torch._dynamo" in sys.modules, left)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]


def test_import_asks_the_network_for_nothing() -> None:
    """Every module; what a host or a Hugging Face hub would hear is an audit event of Python."""
    code = """
import importlib, pkgutil, sys
events = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
def refuse(event, arguments):
    if event in events:
        raise RuntimeError(f"the network is asked at import: {event} {arguments}")
sys.addaudithook(refuse)
import lasp, ring, moe_parallel
for package in (lasp, ring, moe_parallel):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "megatron" not in module.name and not module.name.endswith("__main__"):
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as error:
                assert error.name not in ("lasp", "ring", "moe_parallel"), error
import socket
try:
    socket.create_connection(("localhost", 1))
except RuntimeError:
    print("watched")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["watched"], done.stderr
