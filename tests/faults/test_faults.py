"""A rank that dies, hangs or goes wrong ends the run on every rank, and the run can go on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.faults.job import Fault, FolderLock, run_job

TIMEOUT_S = 4
GONE = r"another rank ended or does not answer, no word yet from ranks \[{}\].* go on with --resume"


class Case(NamedTuple):
    """A fault of one of two ranks, and what is left.

    Attributes:
        fault: which.
        statuses: of the ranks; None: it had to be killed.
        message: the line of every rank that can still speak.
        saved: checkpoints that look whole.
    """

    fault: Fault
    statuses: tuple[int | None, int | None]
    message: str
    saved: tuple[str, ...] = ("step-2",)


CASES = {
    "killed in forward": Case(
        Fault("forward", 1, 3, "kill"), (1, -9), "rank 0 of 2, step 3: " + GONE.format(1)
    ),
    "killed in backward": Case(
        Fault("backward", 0, 3, "kill"), (-9, 1), "rank 1 of 2, step 3: " + GONE.format(0)
    ),
    "killed in the first checkpoint's file": Case(
        Fault("file", 1, 40, "kill"),
        (1, -9),
        "rank 0 of 2, checkpoint of step 2: " + GONE.format(1),
        (),
    ),
    "killed before the second checkpoint is named": Case(
        Fault("rename", 0, 3, "kill"),  # torch renames .metadata, we the folder
        (-9, 1),
        "rank 1 of 2, checkpoint of step 4: " + GONE.format(0),
    ),
    "killed in generation": Case(
        Fault("generation", 1, 2, "kill"),
        (1, -9),
        "rank 0 of 2, generation: " + GONE.format(1),
        ("step-4", "step-6"),
    ),
    "hangs": Case(Fault("forward", 1, 3, "stop"), (1, None), GONE.format(1) + r".*4000 ?ms"),
    "a loss that is no number": Case(
        Fault("loss", 1, 3, "nan"),
        (1, 1),
        r"rank \d of 2, step 3: the loss of step 3 must be finite, got nan .* on rank 1",
    ),
    "a full disk": Case(
        Fault("file", 1, 100, "full"),
        (1, 1),
        r"rank \d of 2, checkpoint of step 4: rank 1: .*No space left on device",
    ),
    "asked to end": Case(
        Fault("forward", 1, 2, "end"), (143, 143), "^$", saved=("step-2", "step-3")
    ),
}


def curve(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def assert_whole(out: Path, names: tuple[str, ...]) -> None:
    """These and no other checkpoints look whole, and every file of them is listed."""
    assert sorted(p.name for p in out.iterdir() if re.fullmatch(r"step-\d+", p.name)) == [*names]
    for name in names:
        listed = json.loads((out / name / "files.json").read_text())
        assert {*listed, "files.json"} == {path.name for path in (out / name).iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    (rank,) = run_job(out, num_ranks=1)
    assert rank.status == 0, rank.said
    return out


def assert_goes_on(out: Path, undisturbed: Path, num_ranks: int = 1) -> str:
    ranks = run_job(out, "--resume-if-any", num_ranks=num_ranks)
    assert [rank.status for rank in ranks] == [0] * num_ranks, ranks[0].said
    assert curve(out) == pytest.approx(curve(undisturbed), rel=1e-9)
    assert_whole(out, ("step-4", "step-6"))
    assert not list(out.glob("*.unfinished"))
    return ranks[0].said


@pytest.mark.parametrize("name", CASES)
def test_a_fault_ends_all_ranks_and_the_run_goes_on(name, tmp_path, undisturbed) -> None:
    """Two ranks, one of them faulty; then one rank continues the curve of an undisturbed run."""
    case = CASES[name]
    ranks = run_job(tmp_path, num_ranks=2, fault=case.fault, timeout_s=TIMEOUT_S)
    assert tuple(rank.status for rank in ranks) == case.statuses, ranks
    for rank in ranks:
        if rank.status is not None and rank.status > 0:
            assert re.search(case.message, rank.said), rank.said
            assert rank.said.count("\n") <= 2, rank.said  # one message
    assert_whole(tmp_path, case.saved)
    assert_goes_on(tmp_path, undisturbed)


def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, undisturbed) -> None:
    """One byte of step 6 is another; two ranks go on from step 4. Then all are damaged."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    path = next((out / "step-6").glob("*.distcp"))
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)
    said = assert_goes_on(out, undisturbed, num_ranks=2)
    assert "step-6 is damaged: __0_0.distcp has other bytes. It is now step-6.damaged" in said
    for path in out.glob("step-?/*.distcp"):
        path.write_bytes(path.read_bytes()[:-1])
    for rank in run_job(out, "--resume", num_ranks=2):
        assert rank.status == 1
        assert "in which all 2 are damaged" in rank.said


def test_a_folder_belongs_to_one_run(tmp_path, undisturbed) -> None:
    lock = FolderLock(tmp_path)
    ranks = run_job(tmp_path, num_ranks=2)
    assert [rank.status for rank in ranks] == [1, 1]
    for rank in ranks:
        assert re.search(
            r"out must belong to one run at a time, got .*, which process \d+", rank.said
        )
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    del lock
