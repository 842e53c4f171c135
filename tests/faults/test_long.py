"""Faults under torchrun and over minutes; on GPUs, what NCCL makes of them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import kills
from tests.faults.test_faults import assert_whole, curve

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FLAGS = (
    *("--cp=2", "--ep=2", "--etp=1", "--steps=6", "--packs=2", "--pack-tokens=64"),
    *("--dtype=float64", "--sample-tokens=3", "--save-every=2", "--resume-if-any"),
)


def run(*command: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command,
        cwd=kills.ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=kills.ENVIRONMENT,
    )
    print(done.stdout, done.stderr)
    return done


def train(out: Path, *flags: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    fault = [part for flag in flags if flag.startswith("--fault") for part in flag.split("=")]
    rest = [flag for flag in flags if not flag.startswith("--fault")]
    job = [f"--max-restarts={restarts}", "-m", kills.JOB, *fault, *FLAGS, *rest, f"--out={out}"]
    return run(*LAUNCHER, *job)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path) -> None:
    options = kills.Options(kills=2, steps=20, num_ranks=2, save_every=5)
    assert kills.check(options, tmp_path) < 1e-9


@pytest.mark.slow
def test_a_rank_that_hangs_is_started_again(tmp_path) -> None:
    """torchrun sends SIGTERM to the stopped rank, and SIGKILL after 30 seconds."""
    assert train(tmp_path / "undisturbed").returncode == 0
    flags = ("--fault=forward,1,3,stop", "--timeout-s=20")
    done = train(tmp_path / "hangs", *flags, restarts=1)
    assert done.returncode == 0
    assert "rank 0 of 2, step 3: another rank ended or does not answer" in done.stderr
    assert curve(tmp_path / "hangs") == pytest.approx(curve(tmp_path / "undisturbed"), rel=1e-9)
    assert_whole(tmp_path / "hangs", ("step-4", "step-6"))


@pytest.mark.slow
def test_a_file_system_without_room(tmp_path) -> None:
    """Room for one checkpoint and a half: the first stays, and a larger disk lets it go on."""
    out, kept = tmp_path / "small", tmp_path / "kept"
    mount = f"mkdir {out} && mount -t tmpfs -o size=1600k tmpfs {out}"
    if run("unshare", "-rm", "sh", "-c", mount).returncode != 0:
        pytest.skip("needs mounts: run as root, or allow user namespaces (unshare -rm)")
    out.rmdir()
    job = " ".join([*LAUNCHER, "-m", kills.JOB, *FLAGS, f"--out={out}"])
    done = run("unshare", "-rm", "sh", "-c", f"{mount}; {job}; cp -r {out} {kept}")
    assert "No space left on device" in done.stderr
    assert_whole(kept, ("step-2",))
    assert train(kept).returncode == 0
    assert_whole(kept, ("step-4", "step-6"))


@pytest.mark.slow
def test_sixty_steps_of_the_soak(tmp_path) -> None:
    """The program runs; bounds need more steps than these to mean anything but for files."""
    done = run(*LAUNCHER, "-m", "tests.faults.soak", "--steps=60", "--no-strict")
    assert done.returncode == 0, done.stderr


@pytest.mark.multi_gpu
@pytest.mark.parametrize("how", ["kill", "stop"])
def test_nccl_ends_a_run_of_two_gpus_and_it_goes_on(how: str, tmp_path) -> None:
    """What torch prints is shown by ``pytest -s``."""
    assert train(tmp_path / "undisturbed").returncode == 0
    began = time.monotonic()
    flags = (f"--fault=forward,1,3,{how}", "--timeout-s=20")
    done = train(tmp_path / "faulty", *flags, restarts=1)
    print(f"{how}: {time.monotonic() - began:.0f} s with the restart")
    assert done.returncode == 0
    if how == "stop":
        assert "Watchdog caught collective operation timeout" in done.stderr
    assert curve(tmp_path / "faulty") == pytest.approx(curve(tmp_path / "undisturbed"), rel=1e-6)
    assert_whole(tmp_path / "faulty", ("step-4", "step-6"))


@pytest.mark.multi_gpu
def test_three_hundred_steps_on_two_gpus_keep_their_memory() -> None:
    done = run(*LAUNCHER, "-m", "tests.faults.soak", "--steps=300", "--dtype=bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
