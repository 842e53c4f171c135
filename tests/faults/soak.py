"""Train for long with a new layout every step: memory, files, threads and caches stay flat.

::

    torchrun --standalone --nproc-per-node 4 -m tests.faults.soak --steps 2000
    torchrun --standalone --nproc-per-node 2 -m tests.faults.soak --steps 300 --dtype bfloat16

The main job with a small model. The largest figures of the last quarter are held against those of
the quarter before. Caches that are bounded by bytes take some ten thousand steps to be full: their
bounds are lowered here, so that these steps fill them and go on.
"""

from __future__ import annotations

import functools
import gc
import json
import random
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
import tyro

from lasp._core.cache import ByteCache
from lasp.launch import init_distributed
from tests.faults.job import SIZES, example, small_corpus, small_model

EVERY = 20
MIB = 2**20
CACHE_BYTES = 2 * MIB  # of each cache that is bounded by bytes


class Figures(NamedTuple):
    """What one rank holds at one step.

    Attributes:
        rss_mib: memory of the process.
        files: open file descriptors.
        threads: of the process.
        cached: entries of all ``lru_cache``, those of torch too.
        cached_mib: bytes in the caches that are bounded by bytes.
        objects: that the garbage collector knows.
        cuda_mib: memory of tensors on the GPU.
    """

    rss_mib: float
    files: int
    threads: int
    cached: int
    cached_mib: float
    objects: int
    cuda_mib: float


# Most growth from the third quarter to the last.
GROWTH = Figures(8, 0, 0, 64, 1, 2000, 1)


@dataclass(frozen=True)
class Options:
    """How long, in which dtype, and whether growth is an error."""

    steps: int = 2000
    strict: bool = True
    dtype: str = "float64"
    pack_tokens: int = 64


def figures() -> Figures:
    """As they are now; lowers the bounds of caches that were made since."""
    gc.collect()
    process = psutil.Process()
    known = gc.get_objects()
    cached = [x for x in known if isinstance(x, functools._lru_cache_wrapper)]
    held = [x for x in known if isinstance(x, ByteCache)]
    for cache in held:
        cache.max_bytes = min(cache.max_bytes, CACHE_BYTES)
    return Figures(
        process.memory_info().rss / MIB,
        process.num_fds(),
        process.num_threads(),
        sum(cache.cache_info().currsize for cache in cached),
        sum(cache.num_bytes for cache in held) / MIB,
        len(known),
        torch.cuda.memory_allocated() / MIB if torch.cuda.is_available() else 0.0,
    )


def packs_of(self: Any, step: int) -> list[Any]:
    """Documents of new lengths in every step."""
    draw = random.Random(step)
    packs = []
    for index in range(self.options.packs):
        pack = self.corpus.pack(step * self.options.packs + index, self.options.pack_tokens)
        cuts = sorted(draw.sample(range(1, len(pack.tokens)), draw.randrange(1, 12)))
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, len(pack.tokens)])]
        packs.append(example.Pack(pack.tokens, pack.labels, tuple(lengths)))
    return example.deal(packs, self.topology.dp)


def soak(options: Options, out: Path) -> dict[str, list[float]]:
    """Train; returns how much each figure grew on each rank. A program of every rank."""
    cp, ep, etp = SIZES[dist.get_world_size()]
    example.small_hybrid, example.Job.packs = small_model, packs_of
    example.Corpus.from_standard_library = small_corpus
    found: list[Figures] = []
    real = example.Job.forward_backward

    def watched(self: Any, step: int) -> Any:
        row = real(self, step)
        if step % EVERY == 0:
            found.append(figures())
            with (out / f"soak-{dist.get_rank()}.jsonl").open("a") as samples:
                samples.write(json.dumps({"step": step, **found[-1]._asdict()}) + "\n")
        return row

    example.Job.forward_backward = watched
    flags = [
        f"--cp={cp}", f"--ep={ep}", f"--etp={etp}", f"--steps={options.steps}", "--packs=2",
        f"--pack-tokens={options.pack_tokens}", f"--dtype={options.dtype}", "--sample-tokens=3",
        f"--save-every={max(2, options.steps // 20)}", f"--out={out}",
    ]  # fmt: skip
    device = torch.device("cpu")
    if dist.get_backend() == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    with example.Ending() as ending:
        example.main(tyro.cli(example.Options, args=flags), device, ending)
    quarter = len(found) // 4
    before, after = (
        [max(values) for values in zip(*rows)]
        for rows in (found[-2 * quarter : -quarter], found[-quarter:])
    )
    grown = [[b - a for a, b in zip(before, after)]] * dist.get_world_size()
    dist.all_gather_object(grown, grown[0])
    return {name: [row[n] for row in grown] for n, name in enumerate(Figures._fields)}


def assert_flat(grown: dict[str, list[float]]) -> None:
    for name, most in zip(Figures._fields, GROWTH):
        assert max(grown[name]) <= most, f"{name} grew by {grown[name]}, at most {most} is flat"


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    init_distributed(timeout=timedelta(seconds=120))
    folder = [tempfile.mkdtemp(prefix="soak-")]
    dist.broadcast_object_list(folder)
    growth = soak(chosen, Path(folder[0]))
    if dist.get_rank() == 0:
        for name, values in growth.items():
            print(f"{name:12} grew on each rank by {[round(value, 2) for value in values]}")
        print(f"all samples: {folder[0]}/soak-*.jsonl")
    if chosen.strict:
        assert_flat(growth)
    dist.destroy_process_group()
