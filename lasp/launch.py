"""Make the default process group, whatever started the ranks: torchrun, Slurm, MPI, or nobody.

::

    launcher    rank, ranks, and those of this host           where rank 0 listens
    torchrun    RANK, WORLD_SIZE, LOCAL_RANK, ...             MASTER_ADDR and MASTER_PORT
    Open MPI    OMPI_COMM_WORLD_RANK, ...                     broadcast by MPI
    MPICH       PMI_RANK, PMI_SIZE, MPI_LOCALRANKID, ...      broadcast by MPI
    Slurm       SLURM_PROCID, SLURM_STEP_NUM_TASKS, ...       first node of the step, port by job
    mpi4py      ``comm``, a communicator                      broadcast by MPI
    none        rank 0 of 1                                   nowhere

The first launcher of this order that set its variables counts: torchrun runs under Slurm, and so
does mpirun. ``MASTER_ADDR`` and ``MASTER_PORT`` replace the last column under every launcher. MPI
only broadcasts an address and ends; tensors travel by NCCL or gloo. No variable says what is
computed.
"""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

DeviceKind = Literal["auto", "cuda", "cpu"]
TIMEOUT = timedelta(minutes=10)
MASTER = ("MASTER_ADDR", "MASTER_PORT")
# Rank, ranks, and the same on this host, as each launcher calls them.
NAMES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Slurm": (
        "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
    ),
}  # fmt: skip
# One of these names its launcher. A batch script has SLURM_PROCID too, but no step; srun sets
# PMI_RANK where it serves PMI; and an address alone is meant for somebody.
SIGNS = (
    ("torchrun", NAMES["torchrun"]),
    ("Open MPI", NAMES["Open MPI"]),
    ("MPICH", NAMES["MPICH"][2:]),
    ("Slurm", NAMES["Slurm"][1:2]),
    ("MPICH", NAMES["MPICH"][:2]),
    ("torchrun", MASTER),
)


class LaunchedRank(NamedTuple):
    """Which process this is among those that were started together.

    Attributes:
        launcher: a name of the table above.
        rank: of this process.
        world_size: processes on all hosts.
        local_rank: of this process on its host.
        local_world_size: processes on this host.
        address: host and port where rank 0 listens; None if MPI has to tell, and for one rank.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: tuple[str, int] | None = None


def launched_rank(environment: Mapping[str, str] = os.environ) -> LaunchedRank:
    """What the launcher says, by its variables; one rank if there is no launcher.

    Raises:
        ValueError: if a variable is missing beside others, or is no number that it can be.
    """
    launcher = next((name for name, signs in SIGNS if any(s in environment for s in signs)), None)
    if launcher is None:
        return LaunchedRank("none", 0, 1, 0, 1)
    names = NAMES[launcher]
    needed = list(names)
    if launcher == "torchrun" or any(name in environment for name in MASTER):
        needed += MASTER
    if launcher == "Slurm":
        needed += ["SLURM_NODEID", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST"]
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} must be set beside {', '.join(names[:2])} under {launcher}: let"
            " the launcher start the ranks (examples/README.md), or unset all of them for one rank"
        )
    rank, world_size, local_rank = (_number(environment, name) for name in names[:3])
    slurm = launcher == "Slurm"
    local_world_size = _slurm_tasks(environment) if slurm else _number(environment, names[3])
    if not (rank < world_size and local_rank < local_world_size <= world_size):
        raise ValueError(
            f"{names[0]} must be below {names[1]}, {names[2]} below {names[3]}, and that at most"
            f" {names[1]}, got {rank}, {world_size}, {local_rank} and {local_world_size}"
        )
    address = None
    if MASTER[0] in environment:
        address = environment[MASTER[0]], _number(environment, MASTER[1])
        if not (address[0] and 0 < address[1] < 2**16):
            raise ValueError(
                f"{MASTER[0]} must name a host and {MASTER[1]} be from 1 to 65535, got {address}"
            )
    elif slurm:
        address = _slurm_address(environment)
    return LaunchedRank(launcher, rank, world_size, local_rank, local_world_size, address)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise ValueError(f"{name} must be a number, 0 or more, got {environment[name]!r}")
    return int(environment[name])


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks on this node: ``4(x2),3`` is 4, 4 and 3."""
    text, node = environment["SLURM_STEP_TASKS_PER_NODE"], _number(environment, "SLURM_NODEID")
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    if None in parts:
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must be like '4(x2),3', got {text!r}")
    tasks = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
    if node >= len(tasks):
        raise ValueError(f"SLURM_NODEID must be below the {len(tasks)} nodes of {text}, got {node}")
    return tasks[node]


def _slurm_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """The first of ``gpu[07-09,11],login1``, and a port that other steps of the node do not have.

    Clusters with several numbers in a name write ``rack[1-2]gpu[07-09]``.

    Ports are those that no kernel hands out by itself.
    """
    first = re.match(r"[^,\[]+(?:\[\d[^\]]*\][^,\[]*)*", environment["SLURM_STEP_NODELIST"])
    if first is None:
        raise ValueError(
            "SLURM_STEP_NODELIST must name a node, got"
            f" {environment['SLURM_STEP_NODELIST']!r}: set MASTER_ADDR and MASTER_PORT"
        )
    job, step = (_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    node = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
    return node, 10000 + (7 * job + step) % 20000


def init_distributed(
    device: DeviceKind = "auto",
    *,
    comm: Any = None,
    timeout: timedelta = TIMEOUT,
    pg_options: Any = None,
) -> torch.device:
    """Make the default group of all ranks and return this rank's device.

    Args:
        device: ``cuda`` is NCCL, ``cpu`` gloo. ``auto`` is CUDA if this host has a GPU for each of
            its ranks, or if Slurm shows each task a GPU of its own.
        comm: an ``mpi4py`` communicator whose ranks are the ranks; None to read the environment.
            Under mpirun this then initialises MPI, unless MASTER_ADDR says where rank 0 listens or
            ``mpi4py.MPI`` was imported before, and ends it when the group is there.
        timeout: of the rendezvous and of every collective.
        pg_options: of ``torch.distributed.init_process_group``.

    Communication: a rendezvous of all ranks.

    Raises:
        ValueError: if the environment is half set, see :func:`launched_rank`, has no GPU for a rank
            that wants one, or names an MPI that mpi4py does not speak to; and on a rank whose kind
            of device is not that of the others.
    """
    owned = False
    launch = launched_rank() if comm is None else _launch_of(comm)
    chosen = choose_device(device, launch, torch.cuda.device_count())
    if launch.address is None and comm is None and launch.launcher in ("Open MPI", "MPICH"):
        owned = "mpi4py.MPI" not in sys.modules
        comm = _world_of_mpi(launch)
    store = _store(launch, comm, timeout)
    if owned:  # a rank that fails would wait for the others in MPI_Finalize, at its exit
        from mpi4py import MPI

        MPI.Finalize()
    kind = store.compare_set("lasp/device", "", chosen.type).decode()
    if kind != chosen.type:
        raise ValueError(
            f"device must be one kind on every rank: rank {launch.rank} on {socket.gethostname()}"
            f" has {chosen.type!r}, others {kind!r}: name it, or mend this host"
        )
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group(
        "nccl" if chosen.type == "cuda" else "gloo",
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timeout,
        pg_options=pg_options,
    )
    return chosen


def choose_device(kind: DeviceKind, launch: LaunchedRank, num_gpus: int) -> torch.device:
    """This rank's device, if its process sees so many GPUs: see :func:`init_distributed`."""
    if kind not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device must be 'auto', 'cuda' or 'cpu', got {kind!r}")
    if kind != "cpu":
        if num_gpus >= launch.local_world_size:
            return torch.device("cuda", launch.local_rank)
        if num_gpus == 1 and (kind == "cuda" or launch.launcher == "Slurm"):
            return torch.device("cuda", 0)  # NCCL refuses a GPU that two ranks share
        if kind == "cuda":
            raise ValueError(
                f"device='cuda' must find a GPU for each of the {launch.local_world_size} ranks of"
                f" a host, or one that only this rank sees, got {num_gpus} on"
                f" {socket.gethostname()}: start fewer ranks a host, or use 'cpu'"
            )
    return torch.device("cpu")


def _mpi() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library was found
        raise ValueError(
            "mpi4py must be importable for MPI to tell where rank 0 listens: pip install"
            f" 'lasp-plus[mpi]', or set MASTER_ADDR and MASTER_PORT ({str(error).splitlines()[0]})"
        ) from error
    return MPI


def _launch_of(comm: Any) -> LaunchedRank:
    local = comm.Split_type(_mpi().COMM_TYPE_SHARED)
    launch = LaunchedRank("mpi4py", comm.rank, comm.size, local.rank, local.size)
    local.Free()
    return launch


def _world_of_mpi(launch: LaunchedRank) -> Any:
    world = _mpi().COMM_WORLD
    if (world.rank, world.size) != (launch.rank, launch.world_size):
        raise ValueError(
            f"mpi4py must be built for the MPI whose mpirun started it: {launch.launcher} says rank"
            f" {launch.rank} of {launch.world_size}, mpi4py rank {world.rank} of {world.size}:"
            " reinstall mpi4py against that MPI, or set MASTER_ADDR and MASTER_PORT"
        )
    return world


def _store(launch: LaunchedRank, comm: Any, timeout: timedelta) -> Store:
    """The store of all ranks, which rank 0 holds, or the agent of torchrun."""
    if launch.launcher == "torchrun":
        agreed: Store = next(rendezvous("env://", timeout=timeout))[0]
        agreed.set_timeout(timeout)
        # The agent's store outlives the ranks that it starts again, with what they said: a new
        # rank would connect to a dead one (https://github.com/pytorch/pytorch/issues/135712). Each
        # host counts its restarts, so several hosts have no common name for an attempt.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            agreed = PrefixStore(f"lasp/attempt-{attempt}", agreed)
        return agreed
    address, first = launch.address, launch.rank == 0
    if address is not None:
        return TCPStore(*address, launch.world_size, first, timeout)
    # Rank 0 takes any free port and says which.
    here = launch.local_world_size == launch.world_size
    host, port = "localhost" if here else socket.gethostname(), 0
    served: Store | None = None
    if first:
        served = TCPStore(host, 0, launch.world_size, True, timeout, wait_for_workers=False)
        port = served.port
    if comm is not None:
        host, port = comm.bcast((host, port), root=0)
    if served is None:
        served = TCPStore(host, port, launch.world_size, False, timeout)
    return served
