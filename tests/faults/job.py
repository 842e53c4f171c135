"""The main job, examples/05, with a small model and a fault that strikes one rank.

As a program it is a rank of torchrun::

    torchrun --nproc-per-node 4 -m tests.faults.job --fault forward,1,3,kill -- FLAGS OF THE EXAMPLE

``run_job`` starts ranks without torchrun, forked from a server that has imported all of it.
"""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.filesystem as dcp_files
import tyro

from lasp.hybrid import AttentionConfig, HybridConfig, HybridModel
from moe_parallel import MoEConfig
from tests.ranks import IMPORTED

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
spec = importlib.util.spec_from_file_location("train_hybrid", EXAMPLES / "05_train_hybrid.py")
assert spec is not None
assert spec.loader is not None
example: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = example  # dataclasses look their module up
spec.loader.exec_module(example)

if __name__ != "__main__":
    multiprocessing.set_forkserver_preload([*IMPORTED, __name__])

FolderLock = sys.modules["hybrid_training.folder"].FolderLock
SIZES = {1: (1, 1, 1), 2: (2, 2, 1), 4: (2, 2, 2)}  # cp, ep and etp of so many ranks


class Fault(NamedTuple):
    """What happens to a rank.

    Attributes:
        where: forward, backward, file, rename, generation or loss.
        rank: whom.
        at: number of the call there, from 0.
        how: kill (SIGKILL), stop (SIGSTOP), end (SIGTERM), full (ENOSPC) or nan.
    """

    where: str
    rank: int
    at: int
    how: str

    def strike(self) -> None:
        if self.how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        name = {"kill": "SIGKILL", "stop": "SIGSTOP", "end": "SIGTERM"}[self.how]
        os.kill(os.getpid(), getattr(signal, name))


def small_model(capacity_factor: float, **_: Any) -> HybridConfig:
    return HybridConfig(
        num_layers=2,
        vocab_size=256,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16, rotary_dim=8),
        moe=MoEConfig(
            hidden_size=32, ffn_size=32, num_experts=4, top_k=2, capacity_factor=capacity_factor,
            aux_loss_coefficient=0.01,
        ),
        pattern="1:1",
    )  # fmt: skip


def small_corpus(_: int) -> Any:
    """The example's own sources: a second less on each rank than the standard library."""
    documents = [path.read_bytes() + b"\0" for path in sorted(EXAMPLES.glob("*/*.py"))]
    stream = torch.frombuffer(bytearray(b"".join(documents)), dtype=torch.uint8)
    return example.Corpus(stream, tuple(accumulate(map(len, documents), initial=0)))


def inject(fault: Fault) -> None:
    """Put the fault in the way of this rank."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fault.at + 1:
            fault.strike()

    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (count(), real(*args, **kwargs))[1])

    if fault.where in ("forward", "backward"):
        build = HybridModel.__init__

        def with_hook(self: HybridModel, *args: Any, **kwargs: Any) -> None:
            build(self, *args, **kwargs)
            layer = self.layers[1]
            if fault.where == "forward":
                layer.register_forward_pre_hook(count)
            else:
                layer.register_full_backward_pre_hook(count)

        HybridModel.__init__ = with_hook
    elif fault.where == "file":
        before(dcp_files, "_write_item")
    elif fault.where == "rename":
        before(Path, "rename")
    elif fault.where == "generation":
        before(HybridModel, "step")
    elif fault.where == "loss":
        real = example.next_token_loss

        def loss(*args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return real(*args) * (float("nan") if calls == fault.at + 1 else 1.0)

        example.next_token_loss = loss


def train(flags: list[str], fault: Fault | None, rank: int, start: Callable[[int], Any]) -> None:
    """What the example does as a program."""
    example.small_hybrid = small_model
    example.Corpus.from_standard_library = small_corpus
    if fault is not None and fault.rank == rank:
        inject(fault)
    options = tyro.cli(example.Options, args=flags)
    device = start(options.timeout_s)
    with example.Ending() as ending:
        example.main(options, device, ending)
    dist.destroy_process_group()


class Rank(NamedTuple):
    """How a rank ended: its status, seconds after its start, and what it wrote to stderr."""

    status: int | None
    seconds: float
    said: str


def run_job(
    out: Path,
    *flags: str,
    num_ranks: int,
    fault: Fault | None = None,
    timeout_s: int = 8,
    steps: int = 6,
) -> list[Rank]:
    """Train; every rank must end, but for one that is stopped."""
    cp, ep, etp = SIZES[num_ranks]
    all_flags = [
        f"--cp={cp}", f"--ep={ep}", f"--etp={etp}", f"--steps={steps}", "--packs=2",
        "--pack-tokens=64", "--dtype=float64", "--sample-tokens=3", "--save-every=2",
        f"--timeout-s={timeout_s}", f"--out={out}", *flags,
    ]  # fmt: skip
    logs = Path(tempfile.mkdtemp(prefix="fault-"))
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_rank, args=(rank, num_ranks, logs, all_flags, fault))
        for rank in range(num_ranks)
    ]
    start = time.monotonic()
    for process in ranks:
        process.start()
    waiting, ended = dict(enumerate(ranks)), {}
    while waiting and time.monotonic() < start + 60 + timeout_s:
        for rank, process in list(waiting.items()):
            if process.exitcode is not None:
                ended[rank] = time.monotonic() - start
                del waiting[rank]
        if fault is not None and fault.how == "stop" and set(waiting) == {fault.rank}:
            break
        time.sleep(0.02)
    for process in waiting.values():
        process.kill()
    return [
        Rank(
            None if rank in waiting else process.exitcode,
            ended.get(rank, float("inf")),
            (logs / f"{rank}.txt").read_text(),
        )
        for rank, process in enumerate(ranks)
    ]


def _rank(rank: int, num_ranks: int, logs: Path, flags: list[str], fault: Fault | None) -> None:
    with (logs / f"{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), 2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)

    def start(timeout_s: int) -> torch.device:
        store = dist.FileStore(str(logs / "store"), num_ranks)
        timeout = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout
        )
        return torch.device("cpu")

    train(flags, fault, rank, start)


if __name__ == "__main__":
    with suppress(ValueError):
        sys.argv.remove("--")
    mine: Fault | None = None
    if sys.argv[1] == "--fault":
        where, whom, at, how = sys.argv[2].split(",")
        mine = Fault(where, int(whom), int(at), how)
        del sys.argv[1:3]
        if int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0:
            mine = None  # it strikes once
    train(
        sys.argv[1:],
        mine,
        int(os.environ["RANK"]),
        lambda timeout_s: example.init_distributed(timeout=timedelta(seconds=timeout_s)),
    )
