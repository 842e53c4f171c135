"""Checkpoints of torch load without running code that they hold."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lasp.checkpoints import CheckpointPlanner, CheckpointReader

ROOT = Path(__file__).parents[2]
UNSAFE = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


def load(state: dict[str, object], folder: Path) -> None:
    reader = CheckpointReader(folder)
    dcp.load(state, storage_reader=reader, planner=CheckpointPlanner(), no_dist=True)


def test_tensors_and_plain_data_load(tmp_path: Path) -> None:
    lr = {"lr": 1e-3, "betas": (0.9, 0.95), "amsgrad": False, "maximize": None}
    dcp.save({"w": torch.arange(3.0), "group": dict(lr)}, checkpoint_id=tmp_path, no_dist=True)
    state = {"w": torch.zeros(3), "group": dict.fromkeys(lr, 0)}
    load(state, tmp_path)
    assert state["w"].tolist() == [0, 1, 2]
    assert state["group"] == lr


def test_an_object_that_runs_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    dcp.save({"x": Harm(harmed)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        load({"x": 0}, tmp_path / "saved")
    assert not harmed.exists()
    dcp.load({"x": 0}, checkpoint_id=tmp_path / "saved", no_dist=True)
    assert harmed.exists()  # by torch's own planner


def test_metadata_with_other_bytes_is_an_error_that_names_it(tmp_path: Path) -> None:
    dcp.save({"w": torch.zeros(2, 3), "n": [1, 2]}, checkpoint_id=tmp_path, no_dist=True)
    metadata, draw = tmp_path / ".metadata", random.Random(0)
    whole = metadata.read_bytes()
    refused = 0
    for _ in range(300):
        bits = int.from_bytes(whole, "little") ^ 1 << draw.randrange(8 * len(whole))
        metadata.write_bytes(bits.to_bytes(len(whole), "little"))
        refused += not reads(tmp_path)
    assert refused > 150  # the others changed a number


def reads(folder: Path) -> bool:
    """Whether the metadata is read; where it is not, the error names it."""
    try:
        CheckpointReader(folder).read_metadata()
    except ValueError as error:
        if ".metadata must " not in str(error):
            raise
        return False
    return True


def test_nothing_else_unpickles() -> None:
    """Every ``torch.load`` asks for weights alone; pickle is read by the checked reader."""
    allowed = {ROOT / "lasp/checkpoints/safe_reader.py"}
    for package in ("lasp", "ring", "moe_parallel", "examples", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text()
            if not any(word in text for word in ("torch.load", *UNSAFE)):
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert "weights_only=True" in ast.unparse(node), path
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                    assert path in allowed or not names & UNSAFE, path
