"""The harness of all benchmarks: options, checks, rows, and what is printed.

A benchmark is a ``Question``: it says which options it has and yields rows, after it has checked
every implementation. ``answer`` does the rest, on one GPU or on the ranks that torchrun,
Slurm or MPI started.
``benchmarks.timing`` takes the times.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lasp.launch import init_distributed

Row = dict[str, Any]
Forward = Callable[..., Any]
T = TypeVar("T")

RESULTS = Path("benchmarks/results")


@dataclass(kw_only=True)
class Options:
    """Options of every benchmark: the commit that rows name, and the folder of the rows."""

    commit: str
    out: Path = RESULTS


@dataclass(kw_only=True)
class DeviceOptions(Options):
    """Options of benchmarks that CPUs run too, in small."""

    device: Literal["cuda", "cpu"] = "cuda"


@dataclass(kw_only=True)
class RankOptions(DeviceOptions):
    """Options of benchmarks over ranks; ``seconds`` is the most for one metric of a case."""

    samples: int = 20
    seconds: float = math.inf


class Machine(NamedTuple):
    """Where and in what to compute, how often, and the most seconds for calls that take turns."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    samples: int = 20
    seconds: float = math.inf

    @property
    def impl(self) -> Literal["triton", "eager"]:
        """Our implementation there."""
        return "triton" if self.device == "cuda" else "eager"


class Question(NamedTuple):
    """A benchmark.

    Attributes:
        name: of its module, and ``benchmark`` in its rows.
        options: of its command line.
        rows: checks every implementation, then yields each row when it is measured.
        cpu_dtype: of tensors where there are no GPUs.
        high_priority: NCCL's transfers may overtake kernels that are queued.
    """

    name: str
    options: type[Options]
    rows: Callable[[Any, Machine], Iterable[Row]]
    cpu_dtype: torch.dtype = torch.float32
    high_priority: bool = False


def parse(options: type[T], doc: str | None, arguments: Sequence[str] | None = None) -> T:
    """Options of the command line."""
    import tyro

    return tyro.cli(options, description=doc, args=arguments)


def answer(question: Question, doc: str | None) -> None:
    """Run a benchmark from the command line; every row is written when it is there."""
    options = parse(question.options, doc)
    machine = Machine()
    if isinstance(options, DeviceOptions):
        on_gpu = options.device == "cuda"
        machine = Machine(options.device, torch.bfloat16 if on_gpu else question.cpu_dtype)
    if isinstance(options, RankOptions):
        machine = machine._replace(samples=options.samples, seconds=options.seconds)
        high = None
        if question.high_priority and on_gpu:
            high = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        init_distributed(options.device, pg_options=high)
    common = environment(options.commit, machine.device)
    for row in question.rows(options, machine):
        if is_first():
            write_rows([row | common], options.out)
            say(printed(row))
    if dist.is_initialized():
        dist.destroy_process_group()


def printed(row: Row) -> str:
    """The line that is printed of a row."""
    case = " ".join(f"{key}={value}" for key, value in row["case"].items())
    text = f"{row['impl']:24} {case} {row['metric']} {row['p50']:.4g} {row['unit']}"
    if row["bound"]:
        text += f" = {row['p50'] / row['bound']:.3f} x {row['bound_name']}"
    return text


def is_first() -> bool:
    """Whether this process writes and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """Print on the first rank."""
    if is_first():
        print(text, flush=True)


def installed(package: str, module: str) -> str | None:
    """The version of a peer; None, which is said, if it is missing."""
    if importlib.util.find_spec(module) is None:
        say(f"left out: {package} is not installed")
        return None
    return importlib.metadata.version(package)


def pack_lengths(tokens: int, documents: int) -> tuple[int, ...]:
    """Log-normal lengths of the documents of a pack."""
    if documents == 1:
        return (tokens,)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(documents, generator=generator).mul(1.5).exp()
    cuts = (weights.cumsum(0) / weights.sum() * tokens).long().tolist()[:-1]
    return tuple(b - a for a, b in zip((0, *cuts), (*cuts, tokens)))


def draw(machine: Machine, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Random tensors, other ones on each rank."""
    seed = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator(machine.device).manual_seed(seed)
    how: Any = {"device": machine.device, "dtype": machine.dtype, "generator": generator}
    return [torch.randn(shape, **how) for shape in shapes]


def results(forward: Forward, inputs: Iterable[Tensor], grads: Any) -> list[Tensor]:
    """Outputs and gradients of a function of leaves made of ``inputs``."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = forward(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, grads)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*(y.detach() for y in outputs), *gradients]


def check(
    name: str, actual: Iterable[Tensor], exact: Iterable[Tensor], limit: float = 1e-2
) -> None:
    """Right before fast: end the run if a result is farther from the exact one than allowed."""
    for index, (got, true) in enumerate(zip(actual, exact)):
        true = true.double()
        distance = (got.to(true.device).double() - true).norm()
        error = (distance / true.norm().clamp(min=1e-30)).item()
        say(f"{name}: result {index} relative error {error:.1e}")
        if not error < limit:
            raise SystemExit(f"{name} is wrong here: result {index}, relative error {error:.1e}")


def row(
    benchmark: str, case: Mapping[str, Any], impl: str, metric: str,
    values: float | Sequence[float], unit: str, **more: Any,
) -> Row:  # fmt: skip
    """A row of sorted samples, or of one value; ``more`` are fields that differ, like the bound."""
    if isinstance(values, Sequence):
        p20, p50, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.5, 0.8))
        found: Row = {"p20": p20, "p50": p50, "p80": p80, "unit": unit, "samples": len(values)}
    else:
        found = {"p20": None, "p50": values, "p80": None, "unit": unit, "samples": None}
    who = {"benchmark": benchmark, "impl": impl, "case": dict(case), "metric": metric}
    return who | found | {"bound": None, "bound_name": None} | more


def environment(commit: str, device: str = "cuda") -> Row:
    """The part of a row that is the same for all rows of a run."""
    facts = {
        "command": shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "device": f"cpu {platform.machine()}",
        "num_devices": dist.get_world_size() if dist.is_initialized() else 1,
        "driver": None,
        "torch": torch.__version__,
        "triton": None,
        "nccl": None,
    }
    if device == "cuda":
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.split()[0]
        facts |= {"driver": driver, "device": torch.cuda.get_device_name()}
        facts["triton"] = importlib.metadata.version("triton")
        if dist.is_initialized():
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def read_rows(folder: Path) -> list[Row]:
    """All rows of a folder."""
    paths = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def markdown(head: Sequence[str], body: Iterable[Sequence[str]], left: Iterable[int]) -> list[str]:
    """Lines of a table; columns stand to the right but for those to the ``left``."""
    ruler = ["---" if index in left else "---:" for index in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ruler, *body)]


def write_rows(rows: Sequence[Row], folder: Path) -> Path:
    """Append to ``<device>-<date>-<commit>.jsonl``, one row a line."""
    first = rows[0]
    device = first["device"].lower().replace(" ", "-")
    path = folder / f"{device}-{first['date']}-{first['commit'][:10]}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for found in rows:
            file.write(json.dumps(found) + "\n")
    return path
