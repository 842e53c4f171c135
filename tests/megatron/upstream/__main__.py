"""Runs the checks one by one; see the package."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from tests.megatron import upstream
from tests.megatron.upstream.attention import attention_checks
from tests.megatron.upstream.checkout import on_rank
from tests.megatron.upstream.experts import expert_checks
from tests.ranks import RankError, close_pools, run_on_ranks


def main() -> int:
    parser = argparse.ArgumentParser(description=upstream.__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM, >= 0.16 and < 0.21")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("-k", default="", help="only the checks whose names have this")
    options = parser.parse_args()
    if not Path(options.checkout, "tests/unit_tests").is_dir():
        parser.error(f"checkout must have tests/unit_tests, got {options.checkout}")
    backend = {"cpu": "gloo", "cuda": "nccl"}[options.device]
    most = 4 if options.device == "cpu" else torch.cuda.device_count()
    counts, lines = dict.fromkeys(("passed", "skipped", "failed"), 0), []
    for check in sorted((*attention_checks(), *expert_checks()), key=lambda check: check.ranks):
        if options.k not in check.name:
            continue
        why = check.skip or (f"{check.ranks} ranks" if check.ranks > most else "")
        outcome = "skipped" if why else "passed"
        if not why:
            with tempfile.TemporaryDirectory() as folder:
                checkout = str(options.checkout.resolve())
                arguments = (checkout, options.device, folder, check.run, *check.arguments)
                try:
                    run_on_ranks(on_rank, check.ranks, *arguments, backend=backend, timeout_s=600)
                except RankError as error:
                    outcome, why = "failed", str(error)
            close_pools()  # process groups are never freed, and their threads keep polling
        counts[outcome] += 1
        lines.append(f"{outcome:8}{check.name}{': ' * bool(why)}{why}")
        print(lines[-1], flush=True)
    # Once more, below what Megatron has written.
    print("\n".join(lines), ", ".join(f"{n} {outcome}" for outcome, n in counts.items()), sep="\n")
    return counts["failed"]


if __name__ == "__main__":
    sys.exit(bool(main()))
