"""Megatron-LM's own training scripts with the command lines of docs/megatron.md.

    python -m tests.megatron.upstream.pretrain Megatron-LM                  # CPU ranks, in small
    python -m tests.megatron.upstream.pretrain Megatron-LM --device cuda    # as documented, 2 GPUs

Each script trains its 20 steps and saves at 10 and 20; a second run resumes from step 10. The loss
must fall, and that of every resumed step must be the first run's. Arguments that are none of these
go to the scripts, after the documented ones.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.megatron.commands import Command, documented_commands

ROOT = Path(__file__).parents[3]
STEPS, RESUMED_AT = 20, 10
CLOSE = 1e-3  # of losses of bfloat16 runs whose kernels may sum in any order
ON_CPU = (
    *("--distributed-backend", "gloo", "--use-cpu-initialization"),
    *("--hidden-size", "256", "--num-attention-heads", "2", "--ffn-hidden-size", "256"),
    *("--vocab-size", "500", "--seq-length", "256", "--max-position-embeddings", "256"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM, 0.19 or later")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-k", default="", help="only the scripts whose names have this")
    parser.add_argument("--logs", type=Path, help="folder for what the scripts print")
    options, more = parser.parse_known_args()
    commands = [command for command in documented_commands() if options.k in command.script]
    for command in commands:
        if not Path(options.checkout, command.script).exists():
            parser.error(f"checkout must have {command.script}, got {options.checkout}")
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        rows = [
            check(command, options.checkout.resolve(), options.device, Path(folder), logs, more)
            for command in commands
        ]
    print(f"{'script':20}{'step':>6}{'loss':>11}{'resumed':>11}")
    for command, (losses, resumed, _) in zip(commands, rows, strict=True):
        for step, loss in losses.items():
            again = f"{resumed[step]:11.6f}" if step in resumed else ""
            print(f"{command.script:20}{step:6}{loss:11.6f}{again}")
    failures = [failure for *_, failed in rows for failure in failed]
    print(*failures, f"{len(commands)} scripts, {len(failures)} failures", sep="\n")
    return len(failures)


def check(
    command: Command, checkout: Path, device: str, folder: Path, logs: Path, more: list[str]
) -> tuple[dict[int, float], dict[int, float], list[str]]:
    """Losses by step of the whole run, of the resumed one, and what is wrong with them."""
    whole, again = folder / command.name, folder / f"{command.name}-resumed"
    losses = train(command, checkout, device, logs, *more, save=whole, load=whole)
    if list(losses) != list(range(1, STEPS + 1)):
        return losses, {}, [f"{command.script}: must log steps 1 to {STEPS}, got {list(losses)}"]
    failures = []
    if not losses[STEPS] < losses[RESUMED_AT] < losses[1]:
        failures.append(f"{command.script}: the loss must fall")
    more = [*more, "--ckpt-step", str(RESUMED_AT)]
    resumed = train(command, checkout, device, logs, *more, save=again, load=whole)
    if list(resumed) != list(range(RESUMED_AT + 1, STEPS + 1)):
        why = f"{command.script}: must log steps {RESUMED_AT + 1} to {STEPS} when resumed"
        return losses, resumed, [*failures, f"{why}, got {list(resumed)}"]
    apart = max(abs(resumed[step] / losses[step] - 1) for step in resumed)
    print(f"{command.script}: resumed losses differ by {apart:.1e} at most", flush=True)
    if not apart <= CLOSE:
        failures.append(f"{command.script}: resumed losses must differ by {CLOSE} at most")
    return losses, resumed, failures


def train(
    command: Command, checkout: Path, device: str, logs: Path, *more: str, save: Path, load: Path
) -> dict[int, float]:
    """Run the script in the checkout; returns the loss of each step that it logs."""
    more = (*more, "--save", str(save), "--load", str(load))
    script = [str(Path(checkout, command.script))]
    if device == "cpu":
        script = [str(Path(__file__).with_name("script.py")), str(checkout), command.script]
        more = (*ON_CPU, *more)
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **command.environment, "PYTHONPATH": os.pathsep.join(paths)}
    log, start = logs / f"{save.name}.log", time.perf_counter()
    with log.open("w") as output:
        status = subprocess.run(
            command.line(*more, script=script),
            cwd=checkout,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    text = log.read_text(errors="replace")
    print(f"{save.name}: status {status}, {time.perf_counter() - start:.0f} s", flush=True)
    if status:
        of_ranks = re.findall(r"^\[rank\d+\]:.*", text, re.MULTILINE)
        print(*(of_ranks or text.splitlines())[-60:], sep="\n", flush=True)
    return logged_losses(text)


def logged_losses(text: str) -> dict[int, float]:
    """Loss of each step, by number, of what Megatron prints with ``--log-interval 1``.

    The second line of a run is the mean of its first two steps: Megatron's ``training_log`` does
    not reset its sums after the first.
    """
    found = re.findall(r" iteration +(\d+)/.*? lm loss: (\S+) ", text)
    losses = {int(step): float(loss) for step, loss in found}
    first, second, *_ = [*losses, None, None]
    if second is not None:
        losses[second] = 2 * losses[second] - losses[first]
    return losses


if __name__ == "__main__":
    sys.exit(bool(main()))
