"""Everything that four and eight GPUs of one host are for, the most telling first.

Runs the tests over many GPUs, Megatron's example where megatron-core is installed, and benchmarks
over all GPUs of the machine, each in processes of its own within eight minutes. Rows are written
after each case. An item that ended well is noted in ``OUT/many-gpus-COUNT.done`` and left out by
the next call with the same commit: start it again where a machine was taken away.

Run: python -m benchmarks.many_gpus --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness import RESULTS

LIMIT = 480  # seconds of an item
MEGATRON = ("examples/megatron/pretrain_hybrid.py", "--steps", "20")
MEGATRON_SIZES = {
    2: ("--cp", "2", "--ep", "2"),
    4: ("--tp", "2", "--cp", "2", "--ep", "2", "--etp", "2"),
    8: ("--tp", "2", "--cp", "2", "--pp", "2", "--ep", "2", "--etp", "2"),
}
EXPERTS = "--max-ctas 0 --samples 10"


@dataclass(kw_only=True)
class Options:
    """Options: the commit and folder of the rows; some items alone; only print the commands."""

    commit: str
    out: Path = RESULTS
    only: tuple[str, ...] = ()
    dry_run: bool = False
    gpus: int = 0


def benchmarks(gpus: int) -> dict[str, str]:
    """Arguments of ``torchrun -m benchmarks.NAME`` by item."""
    meshes = f"{gpus}x1 {gpus // 2}x2" if gpus > 2 else "2x1 1x2"
    a_rank = " ".join(map(str, sorted({2**20 // gpus, 262144})))
    train = "hybrid_train --tokens 1048576 --documents one --activations softmax_outputs"
    lasp = "lasp_ranks --heads 64 --layers 0 78 --only local auto"
    return {
        "lightning": f"{lasp} all_gather sliced scan --tokens 32768 --documents 1 64",
        "lightning of 1M tokens": f"{lasp} --tokens {a_rank} --documents 1 --samples 10",
        "ring, one document": "ring_length --tokens 8192 32768",
        "ring, packs": "ring_packed --documents A B C --orders planned --seconds 2",
        "experts, MiniMax": f"moe_overlap {EXPERTS} --tokens 8192 32768 --meshes {meshes}",
        "experts, Qwen3": f"moe_overlap {EXPERTS} --tokens 8192 --meshes {gpus}x1 --hidden 2048"
        " --ffn 768 --experts 128 --top-k 8",
        "training at 1M": f"{train} --models hybrid --samples 3",
        "softmax at 1M": f"{train} --models softmax --samples 1",
    }


def commands(options: Options, gpus: int) -> Iterator[tuple[str, list[str]]]:
    """Items and their commands."""
    python = [sys.executable, "-m"]
    yield "tests", [*python, "pytest", "-q", "-m", "multi_gpu", "tests/test_many_gpus.py"]
    start = [*python, "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    if importlib.util.find_spec("megatron") is not None:
        with tempfile.TemporaryDirectory() as folder:
            yield "Megatron", [*start, *MEGATRON, *MEGATRON_SIZES[gpus], "--out", folder]
    for item, arguments in benchmarks(gpus).items():
        name, *rest = arguments.split()
        rows = ["--commit", options.commit, "--out", str(options.out)]
        yield item, [*start, "-m", f"benchmarks.{name}", *rest, *rows]


def finished(path: Path) -> set[str]:
    """Lines of the note of items that ended well."""
    return set(path.read_text().splitlines()) if path.exists() else set()


def run(item: str, command: list[str]) -> bool:
    """Whether the item ended well in time; what it prints is seen."""
    print(f"== {item}", flush=True)
    begun, process = time.monotonic(), subprocess.Popen(command)
    try:
        code: int | str = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks
        process.wait()
        code = f"stopped after {LIMIT} s"
    print(f"== {item}: {code}, {time.monotonic() - begun:.0f} s", flush=True)
    return code == 0


def main(options: Options) -> int:
    """Run what is not done; the number of items that went wrong."""
    gpus = options.gpus or torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(f"needs two GPUs or more, found {gpus}; --gpus N --dry-run only prints")
    note = options.out / f"many-gpus-{gpus}.done"
    done, wrong = finished(note), 0
    for item, command in commands(options, gpus):
        line = f"{options.commit} {item}"
        if line in done or (options.only and item not in options.only):
            continue
        if options.dry_run:
            print(f"{item}: {' '.join(command)}")
        elif run(item, command):
            options.out.mkdir(parents=True, exist_ok=True)
            with note.open("a") as file:
                print(line, file=file)
        else:
            wrong += 1
    return wrong


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Options, description=__doc__)))
