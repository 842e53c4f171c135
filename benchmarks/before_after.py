"""Is any operator slower than at another commit? Device and host time, both trees in one run.

Each tree has processes of its own, one a GPU, which stay for the whole run: the trees take turns on
warm operators, in random order, so that a GPU that grows warmer slows both alike. What is compared
is the median over rounds of the ratio within a round.

    git worktree add /tmp/before COMMIT
    python -m benchmarks.before_after /tmp/before                    # one GPU
    python -m benchmarks.before_after /tmp/before --ranks 2          # what needs two

``host_us`` is the time until a call of 256 tokens returns, while nothing waits for the device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import operator_calls
from benchmarks.harness import Row, environment, row, write_rows

ALLOWED = 1.02  # of the device time, by which a change may slow an operator


class Tree:
    """The processes of a checkout, one a rank."""

    def __init__(self, path: Path, ranks: int) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        where = {"PYTHONPATH": str(path.resolve()), "WORLD_SIZE": str(ranks)}
        where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "4"}
        command = [sys.executable, "-P", str(Path(operator_calls.__file__).resolve()), str(ranks)]
        self.processes = [
            subprocess.Popen(
                command, env=os.environ | where | {"RANK": str(rank)}, cwd=path, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def ask(self, **request: Any) -> list[Any]:
        """What every rank answers."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        lines = [p.stdout.readline() for p in self.processes if p.stdout is not None]
        if not all(lines):
            raise SystemExit(f"a process ended at {request}: see its message above")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def compare(trees: dict[str, Tree], what: str, rounds: int) -> Iterator[Row]:
    """A row for each call of an operator and tree, when it is there."""
    calibrated = {name: tree.ask(build=what)[0] for name, tree in trees.items()}
    for name in calibrated["now"]:
        settings = calibrated["now"][name]  # the same in both, on all ranks
        samples: dict[str, list[float]] = {tree: [] for tree in trees}
        for _ in range(rounds):
            for tree in random.sample(list(trees), len(trees)):
                samples[tree].append(max(trees[tree].ask(time=name, settings=settings)))
        ratios = [now / before for now, before in zip(samples["now"], samples["before"])]
        unit, metric = ("us", "host_us") if name.startswith("host") else ("ms", "device_ms")
        before = statistics.median(samples["before"])
        for tree, values in samples.items():
            bound = {"bound": before, "bound_name": "before", "ratio": statistics.median(ratios)}
            case = {"call": name}
            yield row("before_after", case, tree, metric, sorted(values), unit, **bound)
        ratio = statistics.median(ratios)
        mark = "  SLOWER" if ratio > ALLOWED and metric == "device_ms" else ""
        now = statistics.median(samples["now"])
        print(f"{name:32}{before:12.3f}{now:12.3f} {unit}{ratio:9.3f}{mark}", flush=True)


def main() -> None:
    """Compare, and write each row when it is there: a run may end before it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("before", type=Path, help="another checkout")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="", help="only operators whose names have this")
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--before-commit", default="unknown")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    extra = {"before_commit": options.before_commit, "num_devices": options.ranks}
    common = environment(options.commit) | extra
    trees = {"before": Tree(options.before, options.ranks), "now": Tree(Path(), options.ranks)}
    print(f"{'call':32}{'before':>12}{'now':>12}{'now / before':>14}")
    for what in operator_calls.builders(options.ranks):
        if options.only in what:
            for found in compare(trees, what, options.rounds):
                write_rows([found | common], options.results)
    for tree in trees.values():
        tree.close()


if __name__ == "__main__":
    main()
