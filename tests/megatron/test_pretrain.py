"""Megatron's training loop around the hybrid makes one loss curve, however it is split."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

# First: a checkout of Megatron-LM has a script of the same name.
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "megatron"))
from pretrain_hybrid import Options, start_run, train  # isort: skip  (it says where the next one is)
from hybrid_training.corpus import Corpus  # isort: skip

from tests.megatron.cpu import checkpoints_from_ranks, initialize, train_on_cpu
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

OPTIONS = Options(steps=4, pack_tokens=64, dtype="float64", save_every=0)
SIZES = ("tp", "cp", "pp", "vpp", "ep", "etp")


def train_on_rank(options: Options) -> list[dict[str, float]]:
    initialize(**sizes_of(options))
    with train_on_cpu(), checkpoints_from_ranks():
        return train(options, torch.device("cpu"))


def sizes_of(options: Options) -> dict[str, int]:
    return {name: size for name in SIZES if (size := getattr(options, name)) is not None}


def curve(num_ranks: int, out: Path, **changes: Any) -> list[dict[str, float]]:
    options = replace(OPTIONS, out=out, **changes)
    first, *others = run_on_ranks(train_on_rank, num_ranks, options, timeout_s=300)
    for rows in others:
        assert_same_curve(rows, first)
    return first


def assert_same_curve(
    actual: list[dict[str, float]], expected: list[dict[str, float]], rel: float = 1e-9
) -> None:
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for mine, theirs in zip(actual, expected):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=rel), (mine["step"], name)


@pytest.fixture(scope="module")
def curve_of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return curve(1, tmp_path_factory.mktemp("one"))


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


WITHOUT = {"distributed_optimizer": False}
SPLITS = [
    (4, {"tp": 2, "pp": 2, "vpp": 2, "ep": 2}),
    (4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2, **WITHOUT}),
    slow(2, WITHOUT),
    slow(2, {"tp": 2}),
    slow(2, {"cp": 2, "ep": 2, "order": "fold", "recompute": "selective"}),
    slow(2, {"etp": 2}),
    slow(2, {"pp": 2, "recompute": "full"}),
    slow(2, {"pp": 2, "vpp": 2, **WITHOUT}),
    slow(4, {"tp": 2, "ep": 2, "recompute": "selective"}),
    slow(4, {"pp": 2, "vpp": 2, "cp": 2, "ep": 2}),
    slow(4, {"tp": 2, "pp": 2, "etp": 2}),
    slow(4, {"pp": 2, "ep": 2, "recompute": "full"}),
    slow(4, {"cp": 2, "ep": 4, **WITHOUT}),
]


@pytest.mark.parametrize(("num_ranks", "changes"), SPLITS)
def test_steps_agree_over_parallel_sizes(num_ranks, changes, tmp_path, curve_of_one_rank) -> None:
    assert_same_curve(curve(num_ranks, tmp_path, **changes), curve_of_one_rank)


RESUMES = [
    ((1, {}), (4, {"tp": 2, "pp": 2, "ep": 2})),
    slow((4, {"tp": 2, "cp": 2, "ep": 2, "etp": 2}), (2, {"pp": 2, "vpp": 2})),
    slow((4, {"pp": 2, "cp": 2, "etp": 2}), (4, {"tp": 2, "ep": 4})),
    slow((2, {"pp": 2, **WITHOUT}), (4, {"tp": 2, "cp": 2, "ep": 2, **WITHOUT})),
]


@pytest.mark.parametrize(("first", "second"), RESUMES)
def test_resume_under_other_sizes_continues_the_curve(
    first, second, tmp_path, curve_of_one_rank
) -> None:
    rows = curve(first[0], tmp_path, stop_after=2, save_every=1, **first[1])
    assert_same_curve(rows, curve_of_one_rank[:2])
    rows = curve(second[0], tmp_path, resume=True, **second[1])
    # The distributed optimizer saves float32.
    rel = 1e-9 if "distributed_optimizer" in second[1] else torch.finfo(torch.float32).eps
    assert_same_curve(rows, curve_of_one_rank[2:], rel)


def test_a_resumed_run_has_one_line_a_step_and_the_options_of_the_first(tmp_path: Path) -> None:
    curve(1, tmp_path, stop_after=3, save_every=2)
    (tmp_path / "step-3").rename(tmp_path / "lost")  # stopped between two checkpoints
    rows = curve(1, tmp_path, resume=True)
    assert [row["step"] for row in rows] == [2, 3]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for changes, message in (
        ({"resume": True, "learning_rate": 1e-3}, "learning_rate must be 0.006 as in the run"),
        ({"resume": True, **WITHOUT}, "distributed_optimizer must be True as in the run"),
        ({}, "out must hold checkpoints with --resume and none without"),
        ({"resume": True, "out": tmp_path / "new"}, "out must hold checkpoints with --resume"),
    ):
        with pytest.raises(ValueError, match=message):
            start_run(replace(OPTIONS, **({"out": tmp_path} | changes)))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [{}, WITHOUT], ids=["distributed", "whole"])
def test_sixteen_bits_train_and_resume(optimizer: dict[str, bool], tmp_path: Path) -> None:
    """Parameters of one dtype, the routers' too: Megatron's optimizers save no others."""
    changes = {"cp": 2, "ep": 2, "dtype": "bfloat16", "steps": 8, **optimizer}
    rows = curve(2, tmp_path / "whole", **changes)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    curve(2, tmp_path / "parts", **changes, stop_after=4, save_every=4)
    resumed = curve(2, tmp_path / "parts", **changes, resume=True)
    assert_same_curve(resumed, rows[4:])


def test_replicas_share_the_packs_of_a_step() -> None:
    corpus = Corpus.from_standard_library(0)
    (whole,) = corpus.replicas(3, num_replicas=1, per_step=4, num_tokens=64)
    parts = corpus.replicas(3, num_replicas=2, per_step=4, num_tokens=64)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert parts[0].document_lengths + parts[1].document_lengths == whole.document_lengths
    with pytest.raises(ValueError, match="packs of a step must divide by dp 3, got 4"):
        corpus.replicas(3, num_replicas=3, per_step=4, num_tokens=64)
