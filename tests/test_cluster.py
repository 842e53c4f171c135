"""Launch scripts of examples/cluster: their sizes fit, and they print what they would run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.launchers import ENVIRONMENT, mpirun

CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"
SCRIPTS = ("torchrun.sh", "slurm.sh", "mpi.sh")
with patch.object(sys, "path", [*sys.path, str(CLUSTER)]):
    import sizes


@pytest.mark.parametrize("nodes", [2, 4, 8, 16, 32, 64])
def test_sizes_for_a_million_tokens(nodes: int) -> None:
    found = sizes.sizes_of(sizes.Options(nodes=nodes))
    assert found.cp * found.dp == 8 * nodes
    assert found.context / found.cp <= 65536
    assert (found.cp, found.ep, found.etp, found.order) == (16, 8, 1, "zigzag")
    report = sizes.report(sizes.Options(nodes=nodes), found)
    assert f"cp 16: 65536 tokens a rank, order zigzag; dp {nodes // 2}" in report
    assert report.splitlines()[-1] == found.flags


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="1048576 tokens, 65536 on each of 16 ranks, got 8 ranks"):
        sizes.sizes_of(sizes.Options(nodes=1))
    # cp is a divisor of the ranks: 20 holds what 16 ranks must.
    found = sizes.sizes_of(sizes.Options(nodes=5, gpus=4, experts=6))
    assert (found.cp, found.dp, found.ep) == (20, 1, 2)


@pytest.mark.parametrize("script", [*SCRIPTS, "common.sh"])
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", CLUSTER / script], check=True)


def dry_run(script: str, *arguments: str, **environment: str) -> list[str]:
    """Lines that it prints; the sizes come from this Python."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    clean = {name: value for name, value in os.environ.items() if "SLURM" not in name}
    done = subprocess.run(
        [CLUSTER / script, "--dry-run", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=clean | environment | {"PATH": path},
    )
    return done.stdout.splitlines()


FLAGS = "--cp 16 --ep 8 --etp 1 --order zigzag --packs 2 --pack-tokens 1048576"


def test_torchrun() -> None:
    *report, command = dry_run("torchrun.sh", "4", "node1", "--steps", "9")
    assert report[0] == "4 nodes of 8 GPUs, 1048576 tokens a pack"
    assert command.startswith("torchrun --nnodes 4 --nproc-per-node 8 --max-restarts 3")
    assert "--rdzv-endpoint node1:29400" in command
    assert f"05_train_hybrid.py {FLAGS} --dtype bfloat16 --steps 9" in command


@pytest.mark.slow
def test_mpi() -> None:
    *_, command = dry_run("mpi.sh", "4", "hosts")
    assert command.startswith("mpirun -n 32 --hostfile hosts --map-by ppr:8:node")
    assert FLAGS in command


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"IMAGE": "a.sqsh"}, "--kill-on-bad-exit=1 --container-image a.sqsh --container-mounts"),
        pytest.param({}, "--kill-on-bad-exit=1 python", marks=pytest.mark.slow),
        pytest.param(
            {"IMAGE": "a.sif", "RUNTIME": "apptainer"},
            "apptainer exec --nv --bind",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_slurm(environment: dict[str, str], words: str) -> None:
    *_, command = dry_run("slurm.sh", NODES="4", **environment)
    assert command.startswith("srun --nodes 4 --ntasks-per-node 8")
    assert words in command
    assert FLAGS in command


@pytest.mark.slow
@pytest.mark.parametrize("script", ["torchrun.sh", "mpi.sh"])
def test_two_ranks_of_this_host_train(script: str, tmp_path: Path) -> None:
    """What the script starts, in small."""
    mpirun(2)  # skips where there is none
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    where = "localhost" if script == "torchrun.sh" else str(tmp_path / "hosts")
    flags = ("--stop-after", "1", "--sample-tokens", "0", "--out", str(tmp_path / "run"))
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    small = {"GPUS": "2", "CONTEXT": "256", "PATH": path, "PORT": "0"}
    command = [CLUSTER / script, "1", where, *flags]
    subprocess.run(command, check=True, env=ENVIRONMENT | small, timeout=300)
    assert (tmp_path / "run" / "metrics.jsonl").exists()
