"""Conversions of large checkpoints: what is their memory, and is it what they say?

    python -m benchmarks.checkpoint_conversion headers --model minimax-text-01
    python -m benchmarks.checkpoint_conversion real --folder /scratch/conversion

``headers`` writes the index and the headers of a named model, in files that have their size but no
blocks on the disk, and plans a conversion of them. ``real`` writes random weights, converts them
in processes of their own, and prints the most memory that each held beside what it had after the
plan.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from lasp.checkpoints import Options, open_source, plan
from lasp.checkpoints.configs import config_fields
from lasp.checkpoints.mapping import MappedTensor, mapped
from lasp.checkpoints.safetensors_folder import plan_shards, write_index, write_shards
from lasp.hybrid import MINIMAX_TEXT_01, NAMED_CONFIGS, AttentionConfig, HybridConfig
from moe_parallel import MoEConfig

SHARD_BYTES = 4 * 10**9
# MiniMax-Text-01's layers, narrower, so that an expert and a shard are small beside the whole.
NARROW = replace(
    MINIMAX_TEXT_01,
    num_layers=8,
    vocab_size=50_048,
    attention=AttentionConfig(16, 8, 128, rotary_dim=64, rope_base=1e7),
    moe=MoEConfig(hidden_size=2048, ffn_size=9216, num_experts=9, top_k=2),
)
# In a process of its own: the most memory it held before and after the conversion.
MEASURED = """
import sys
from pathlib import Path
from lasp.checkpoints import Options, convert, open_source, plan

def most_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

options = Options(sys.argv[3], shard_bytes=int(sys.argv[4]))
conversion = plan(open_source(Path(sys.argv[1])), options)
before = most_memory()
convert(conversion, Path(sys.argv[2]), options)
print(conversion.num_bytes, conversion.largest_bytes, before, most_memory())
"""


class MeasuredConversion(NamedTuple):
    """Bytes of a conversion.

    Attributes:
        num_bytes: of the weights.
        bound_bytes: of memory, as the plan says.
        used_bytes: most memory that the process held, less what it held after the plan.
        seconds: of the process.
    """

    num_bytes: int
    bound_bytes: int
    used_bytes: int
    seconds: float


def write_headers(config: HybridConfig, folder: Path) -> None:
    """Files of a model that have all but the weights."""
    folder.mkdir(parents=True)
    file_format, fields = config_fields(config)
    tensors = mapped(file_format.family, config)
    sizes = [(tensor.name, 2 * torch.Size(tensor.shape).numel()) for tensor in tensors]
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    (shards,) = plan_shards([sizes], SHARD_BYTES)
    for shard in shards:
        header, end = {}, 0
        for name in shard.names:
            start, end = end, end + 2 * torch.Size(shapes[name]).numel()
            described = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            header[name] = described
        text = json.dumps(header).encode()
        with (folder / shard.file).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    write_index(folder, shards, sum(size for _, size in sizes))
    (folder / "config.json").write_text(json.dumps(fields))


def write_random(config: HybridConfig, folder: Path) -> None:
    """Files of a model with random bits, no two tensors alike."""
    folder.mkdir(parents=True)
    file_format, fields = config_fields(config)
    tensors = mapped(file_format.family, config)
    sizes = [(tensor.name, 2 * torch.Size(tensor.shape).numel()) for tensor in tensors]
    (shards,) = plan_shards([sizes], SHARD_BYTES // 4)
    noise = torch.randint(-(2**15), 2**15 - 1, (2**24,), dtype=torch.int16)

    def random(number: int, tensor: MappedTensor) -> Tensor:
        size = torch.Size(tensor.shape).numel()
        repeated = noise.roll(977 * number).repeat(-(-size // len(noise)))[:size].clone()
        return repeated.view(torch.bfloat16).view(tensor.shape)

    write_shards(folder, shards, (random(*pair) for pair in enumerate(tensors)))
    write_index(folder, shards, sum(size for _, size in sizes))
    (folder / "config.json").write_text(json.dumps(fields))


def measured(
    source: Path, out: Path, to: str, shard_bytes: int = SHARD_BYTES
) -> MeasuredConversion:
    """Convert in a process of its own."""
    start = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(out), to, str(shard_bytes)],
        check=True,
        capture_output=True,
        text=True,
    )
    num_bytes, bound, before, most = map(int, run.stdout.split())
    return MeasuredConversion(num_bytes, bound, most - before, time.monotonic() - start)


def same_files(first: Path, second: Path) -> bool:
    """Whether two folders of files hold the same bits, tensor by tensor."""
    one, other = (open_source(folder).storage for folder in (first, second))
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(*(storage.read(name, None).view(torch.int16) for storage in (one, other)))
        for name in one.tensors
    )


def headers(model: str) -> None:
    """Plan conversions of a named model's files.

    Args:
        model: one of ``python -m lasp.hybrid``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "files"
        write_headers(NAMED_CONFIGS[model], folder)
        for to in ("plain", "megatron", "hf"):
            start = time.monotonic()
            conversion = plan(open_source(folder), Options(to))
            seconds = time.monotonic() - start
            names = {tensor.name for tensor, _ in conversion.tensors}
            print(
                f"{model}: {len(conversion.source.storage.tensors):,} tensors,"
                f" {conversion.num_bytes / 1e9:,.1f} GB -> {to}: {len(names):,} tensors, memory at"
                f" most {conversion.largest_bytes / 1e9:.2f} GB, planned in {seconds:.1f} s"
            )


def real(folder: Path) -> None:
    """Convert 9 GB there and back, and compare.

    Args:
        folder: to write; 30 GB are needed, and go at the end.
    """
    try:
        write_random(NARROW, folder / "in")
        for source, out, to in (
            ("in", "plain", "plain"),
            ("plain", "out", "hf"),
            ("in", "megatron", "megatron"),
        ):
            if to == "megatron":
                shutil.rmtree(folder / "plain")
            of = measured(folder / source, folder / out, to)
            print(
                f"{source} -> {out}: {of.num_bytes / 1e9:.2f} GB in {of.seconds:.0f} s; memory at"
                f" most {of.bound_bytes / 1e9:.3f} GB by the plan,"
                f" {of.used_bytes / 1e9:.3f} GB used"
            )
        print(f"the same bits: {same_files(folder / 'in', folder / 'out')}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"headers": headers, "real": real})
