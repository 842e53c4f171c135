"""Kill ranks of a training run at random moments; ``torchrun --max-restarts`` must finish it.

::

    python -m tests.faults.kills                  # 20 kills of 300 steps on 4 ranks, by hand
    python -m tests.faults.kills --kills 2 --steps 20 --num-ranks 2

The last losses must be those of an undisturbed run to rounding, no file may be lost, and no
checkpoint may look whole that is not. One kill in five comes while the ranks start; the others come
when a step begins that the seed chose, up to a second later: in its forward, its backward, its
checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

ROOT = Path(__file__).parents[2]
JOB = "tests.faults.job"
PATHS = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
SIZES = {2: ("--cp=2", "--ep=2", "--etp=1"), 4: ("--cp=2", "--ep=2", "--etp=2")}
START_S = 20.0  # of ranks, while which some are killed


@dataclass(frozen=True)
class Options:
    """What is trained and how often it is killed."""

    kills: int = 20
    steps: int = 300
    num_ranks: int = 4
    seed: int = 0
    save_every: int = 10


def start(options: Options, out: Path, max_restarts: int) -> subprocess.Popen[str]:
    """The run under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [
            *launcher, f"--nproc-per-node={options.num_ranks}", f"--max-restarts={max_restarts}",
            "-m", JOB, *SIZES[options.num_ranks], f"--steps={options.steps}", "--packs=2",
            "--pack-tokens=64", "--dtype=float64", "--sample-tokens=3", "--resume-if-any",
            f"--save-every={options.save_every}", "--timeout-s=120", f"--out={out}",
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=(out.parent / f"{out.name}.log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def ranks_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The rank processes that live now."""
    try:
        children = psutil.Process(run.pid).children()
        return [child for child in children if JOB in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def rows_of(out: Path) -> list[dict[str, float]]:
    """Finished lines of metrics.jsonl."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def disturb(options: Options, run: subprocess.Popen[str], out: Path) -> list[str]:
    """Kill ranks; returns when and whom."""
    draw, killed = random.Random(options.seed), []
    steps = sorted(draw.randrange(options.steps - 1) for _ in range(options.kills))
    before: set[int] = set()
    for number, step in enumerate(steps):
        while len(ranks := ranks_of(run)) < options.num_ranks or before & {r.pid for r in ranks}:
            assert run.poll() is None, "the run ended before all kills"
            time.sleep(0.02)
        before = {rank.pid for rank in ranks}
        if number % 5 == 0:
            moment = draw.uniform(0, START_S)
        else:
            moment = draw.uniform(0, 1)
            begun = (out / "metrics.jsonl").stat().st_mtime if rows_of(out) else 0.0
            while True:  # until this attempt has written the row of the step before
                rows, at = rows_of(out), out / "metrics.jsonl"
                if rows and at.stat().st_mtime > begun and rows[-1]["step"] >= step - 1:
                    break
                assert run.poll() is None, "the run ended before all kills"
                time.sleep(0.02)
        time.sleep(moment)
        victim = draw.choice(range(options.num_ranks))
        reached = len(rows_of(out))
        ranks[victim].kill()
        killed.append(f"kill {number + 1}: rank {victim} with {reached} steps done")
        print(killed[-1], flush=True)
    return killed


def assert_nothing_lost(options: Options, out: Path, undisturbed: Path) -> float:
    """The largest relative difference of a loss from the undisturbed run's."""
    mine, theirs = rows_of(out), rows_of(undisturbed)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    assert len(mine) == options.steps
    ends = options.steps - options.save_every, options.steps
    expected = {"metrics.jsonl", "options.json", "loss.png", "run.lock"}
    assert {path.name for path in out.iterdir()} == expected | {f"step-{end}" for end in ends}
    for end in ends:
        listed = json.loads((out / f"step-{end}" / "files.json").read_text())
        assert {*listed, "files.json"} == {path.name for path in (out / f"step-{end}").iterdir()}
    return max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(mine, theirs))


def check(options: Options, folder: Path) -> float:
    """Both runs; returns the largest relative difference of a loss."""
    undisturbed, out = folder / "undisturbed", folder / "killed"
    assert start(options, undisturbed, 0).wait() == 0, (folder / "undisturbed.log").read_text()
    began = time.monotonic()
    run = start(options, out, options.kills)
    try:
        killed = disturb(options, run, out)
        assert run.wait() == 0, (folder / "killed.log").read_text()[-5000:]
    finally:
        run.kill()
    seconds = time.monotonic() - began
    log = (folder / "killed.log").read_text()
    damaged = re.findall(r"is damaged", log)
    difference = assert_nothing_lost(options, out, undisturbed)
    print(
        f"{len(killed)} kills in {seconds:.0f} s, {len(damaged)} damaged checkpoints, largest"
        f" relative difference of {options.steps} losses {difference:.1e}"
    )
    return difference


if __name__ == "__main__":
    assert check(tyro.cli(Options), Path(tempfile.mkdtemp(prefix="kills-"))) < 1e-9
