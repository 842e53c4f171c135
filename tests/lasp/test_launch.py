"""What each launcher says, and ranks that MPI and Slurm's variables start."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lasp import launch
from lasp.launch import LaunchedRank, choose_device, init_distributed, launched_rank
from tests.launchers import ENVIRONMENT, mpirun

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
OPEN_MPI = {
    f"OMPI_COMM_WORLD_{name}": value
    for name, value in {"RANK": "5", "SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}.items()
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}  # fmt: skip
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "11", "SLURM_JOB_ID": "1234"}
PORT = 10000 + 7 * 1234


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, LaunchedRank("none", 0, 1, 0, 1)),
        (BATCH_SCRIPT, LaunchedRank("none", 0, 1, 0, 1)),
        (TORCHRUN | MASTER, LaunchedRank("torchrun", 5, 8, 1, 4, ("10.0.0.1", 29500))),
        (OPEN_MPI, LaunchedRank("Open MPI", 5, 8, 1, 4)),
        (OPEN_MPI | MASTER, LaunchedRank("Open MPI", 5, 8, 1, 4, ("10.0.0.1", 29500))),
        (MPICH, LaunchedRank("MPICH", 5, 8, 1, 4)),
        (SLURM, LaunchedRank("Slurm", 5, 11, 1, 4, ("gpu07", PORT))),
        (SLURM | MASTER, LaunchedRank("Slurm", 5, 11, 1, 4, ("10.0.0.1", 29500))),
        # One launcher under another: whoever started this process is asked.
        (SLURM | TORCHRUN | MASTER, LaunchedRank("torchrun", 5, 8, 1, 4, ("10.0.0.1", 29500))),
        (SLURM | OPEN_MPI, LaunchedRank("Open MPI", 5, 8, 1, 4)),
        (SLURM | MPICH, LaunchedRank("MPICH", 5, 8, 1, 4)),
        (SLURM | {"PMI_RANK": "5"}, LaunchedRank("Slurm", 5, 11, 1, 4, ("gpu07", PORT))),
    ],
)
def test_every_launcher(environment: dict[str, str], expected: LaunchedRank) -> None:
    assert launched_rank(environment) == expected


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("a,b[1-2]", "a"),
        ("rack1-gpu[003,005-009],x", "rack1-gpu003"),
        ("n[1-4]-ib", "n1-ib"),
        ("n[1-4]-ib,m", "n1-ib"),
        ("rack[1-2]gpu[03-04]-ib,x", "rack1gpu03-ib"),
    ],
)
def test_the_first_node_of_a_step_is_where_rank_0_listens(nodes: str, first: str) -> None:
    address = launched_rank(SLURM | {"SLURM_STEP_NODELIST": nodes}).address
    assert address == (first, PORT)


def test_steps_of_a_node_listen_on_ports_of_their_own() -> None:
    steps = [{"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "1235"}, {}]
    assert len({launched_rank(SLURM | step).address for step in steps}) == 3


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        *((without(TORCHRUN | MASTER, name), f"^{name} must be set") for name in TORCHRUN),
        (TORCHRUN, "^MASTER_ADDR, MASTER_PORT must be set beside RANK, WORLD_SIZE under torchrun"),
        (MASTER, "^RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE must be set"),
        *((without(OPEN_MPI, name), f"^{name} must be set") for name in OPEN_MPI),
        (OPEN_MPI | {"MASTER_PORT": "1"}, "^MASTER_ADDR must be set .* under Open MPI"),
        *((without(MPICH, name), f"^{name} must be set") for name in MPICH),
        ({"PMI_SIZE": "2"}, "^PMI_RANK, MPI_LOCALRANKID, MPI_LOCALNRANKS must be set"),
        *(
            (without(SLURM, name), f"^{name} must be set")
            for name in SLURM
            if name != "SLURM_STEP_NUM_TASKS"
        ),
        (SLURM | {"MASTER_ADDR": "a"}, "^MASTER_PORT must be set .* under Slurm"),
        (TORCHRUN | MASTER | {"RANK": "-1"}, "^RANK must be a number, 0 or more, got '-1'"),
        (TORCHRUN | MASTER | {"MASTER_PORT": "x"}, "^MASTER_PORT must be a number"),
        (TORCHRUN | MASTER | {"MASTER_PORT": "65536"}, "MASTER_PORT be from 1 to 65535, got"),
        (SLURM | MASTER | {"MASTER_ADDR": ""}, "^MASTER_ADDR must name a host .*, got"),
        (TORCHRUN | MASTER | {"RANK": "8"}, "^RANK must be below WORLD_SIZE.* got 8, 8, 1 and 4"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4x2"}, "^SLURM_STEP_TASKS_PER_NODE must be like"),
        (SLURM | {"SLURM_NODEID": "3"}, "^SLURM_NODEID must be below the 3 nodes of 4"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "^SLURM_STEP_NODELIST must name a node"),
    ],
)
def test_half_an_environment_is_an_error(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launched_rank(environment)


def test_a_gpu_for_each_rank_of_the_host() -> None:
    alone, four = LaunchedRank("none", 0, 1, 0, 1), launched_rank(OPEN_MPI)
    assert choose_device("auto", alone, 0) == torch.device("cpu")
    assert choose_device("auto", alone, 8) == torch.device("cuda", 0)
    assert choose_device("auto", four, 8) == choose_device("cuda", four, 4)
    assert choose_device("auto", four, 4) == torch.device("cuda", 1)
    assert choose_device("cpu", four, 4) == choose_device("auto", four, 3) == torch.device("cpu")
    # Each rank sees a GPU of its own: Slurm binds them so, and others if they are told to.
    assert choose_device("auto", launched_rank(SLURM), 1) == torch.device("cuda", 0)
    assert choose_device("auto", four, 1) == torch.device("cpu")
    assert choose_device("cuda", four, 1) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="a GPU for each of the 4 ranks"):
        choose_device("cuda", four, 3)
    with pytest.raises(ValueError, match="device must be 'auto', 'cuda' or 'cpu', got 'gpu'"):
        init_distributed("gpu")  # type: ignore[arg-type]


PROGRAM = """
import sys, torch, torch.distributed as dist
from lasp.launch import init_distributed, launched_rank
comm = None
if "comm" in sys.argv:
    from mpi4py.MPI import COMM_WORLD as comm
device = init_distributed("cpu", comm=comm)
ranks = torch.zeros(dist.get_world_size(), dtype=torch.int64)
ranks[dist.get_rank()] = dist.get_rank()
dist.all_reduce(ranks)
if "fail" in sys.argv and dist.get_rank() == 1:
    raise RuntimeError("rank 1 fails")
dist.barrier()
print(f"{launched_rank().launcher} {dist.get_rank()} of {ranks.tolist()}\\n", end="")
dist.destroy_process_group()
"""


def run_mpi(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*mpirun(num_ranks), "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )


def test_four_mpi_ranks() -> None:
    done = run_mpi(4)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = sorted(line for line in done.stdout.splitlines() if line)
    assert lines == [f"Open MPI {rank} of [0, 1, 2, 3]" for rank in range(4)]


@pytest.mark.slow
def test_a_communicator_of_the_program() -> None:
    done = run_mpi(2, "comm")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_an_mpi_rank_that_fails_ends_the_others() -> None:
    """It would wait for them in MPI_Finalize, and they for it in a collective."""
    done = run_mpi(4, "fail")
    assert done.returncode != 0
    assert "rank 1 fails" in done.stderr


def test_ranks_that_srun_would_start() -> None:
    """Two processes with the variables of a step on this host."""
    step = SLURM | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NODEID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=ENVIRONMENT | step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert printed == [f"Slurm {rank} of [0, 1]\n" for rank in range(2)]


def test_ranks_that_torchrun_starts_again_do_not_read_what_dead_ones_said(monkeypatch) -> None:
    """The agent's store has the addresses of the ranks before; here it is a store that stays."""
    agent = torch.distributed.HashStore()
    monkeypatch.setattr(launch, "rendezvous", lambda *_, **__: iter([(agent, 0, 1)]))
    for name, value in (TORCHRUN | MASTER | {"GROUP_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    seen = []
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store = launch._store(launch.launched_rank(), None, launch.TIMEOUT)
        seen.append(store.check(["rank 0 listens on"]))
        store.set("rank 0 listens on", attempt)
    assert seen == [False, False]
