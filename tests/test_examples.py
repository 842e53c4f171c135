"""The examples run as a reader would run them, and the training job is one job on any ranks."""

from __future__ import annotations

import ast
import importlib
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.launchers import ENVIRONMENT, mpirun, torchrun
from tests.ranks import close_pools, refusal, run_on_ranks

Launcher = Callable[[int], list[str]]
EXAMPLES = Path(__file__).parent.parent / "examples"
# A small batch in float64, so that the steps agree to far below what anyone could read off a plot.
SMALL = ("--steps", "6", "--packs", "4", "--pack-tokens", "96", "--dtype", "float64")


def example(name: str) -> Any:
    """A module of the examples."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def run(script: str, *args: str, num_ranks: int = 1, launcher: Launcher = torchrun) -> str:
    start = [sys.executable] if num_ranks == 1 else launcher(num_ranks)
    done = subprocess.run(
        [*start, str(EXAMPLES / script), *args],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_on_rank(arguments: list[str]) -> None:
    import tyro

    job = example("05_train_hybrid")
    ending = example("hybrid_training.endings").Ending()  # not entered: errors are to be raised
    job.main(tyro.cli(job.Options, args=arguments), torch.device("cpu"), ending)


def arguments_of(out: Path, *args: str, **sizes: int) -> list[str]:
    flags = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    return [*SMALL, "--sample-tokens", "3", "--out", str(out), *flags, *args]


def curve_in(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(out: Path, *args: str, num_ranks: int, **sizes: int) -> list[dict[str, float]]:
    """The script on ranks that have imported torch already."""
    run_on_ranks(train_on_rank, num_ranks, arguments_of(out, *args, **sizes), timeout_s=300)
    return curve_in(out)


@pytest.fixture(scope="module", autouse=True)
def ranks_end_with_this_file() -> Iterator[None]:
    """Every run of the script makes groups, which would keep polling."""
    yield
    close_pools()


def assert_same_curve(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert [row["step"] for row in actual] == [row["step"] for row in expected]
    for mine, theirs in zip(actual, expected):
        for name in ("loss", "aux_loss", "grad_norm", "dropped_share"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9), (mine["step"], name)


@pytest.fixture(scope="module")
def curve_of_one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """By the command of a reader."""
    out = tmp_path_factory.mktemp("one")
    run("05_train_hybrid.py", *arguments_of(out, cp=1, ep=1, etp=1))
    return curve_in(out)


@pytest.mark.parametrize(
    ("num_ranks", "order", "sizes"),
    [
        (4, "zigzag", {"cp": 2, "ep": 2, "etp": 2}),
        (2, "fold", {"cp": 2, "ep": 2, "etp": 1}),
        pytest.param(2, "contiguous", {"cp": 1, "ep": 1, "etp": 2}, marks=pytest.mark.slow),
        pytest.param(4, "fold", {"cp": 4, "ep": 4, "etp": 1}, marks=pytest.mark.slow),
        pytest.param(4, "zigzag", {"cp": 1, "ep": 2, "etp": 1}, marks=pytest.mark.slow),
        pytest.param(8, "zigzag", {"cp": 4, "ep": 2, "etp": 2}, marks=pytest.mark.slow),
    ],
)
def test_steps_agree_over_parallel_sizes(
    num_ranks, order, sizes, tmp_path, curve_of_one_rank
) -> None:
    rows = train(tmp_path, "--order", order, num_ranks=num_ranks, **sizes)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert any(row["dropped_share"] > 0 for row in rows)
    assert_same_curve(rows, curve_of_one_rank)


@pytest.mark.slow
def test_mpi_ranks_train_the_same_curve(tmp_path, curve_of_one_rank) -> None:
    arguments = arguments_of(tmp_path, "--stop-after", "2", cp=2, ep=2, etp=2)
    run("05_train_hybrid.py", *arguments, num_ranks=4, launcher=mpirun)
    assert_same_curve(curve_in(tmp_path), curve_of_one_rank[:2])


def test_resume_on_other_ranks_continues_the_curve(tmp_path, curve_of_one_rank) -> None:
    """4 ranks train 3 steps; 2 ranks with other parallel sizes go on to the end."""
    train(tmp_path, "--stop-after", "3", num_ranks=4, cp=2, ep=2, etp=2)
    rows = train(tmp_path, "--resume", num_ranks=2, cp=1, ep=1, etp=2)
    assert_same_curve(rows, curve_of_one_rank)
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "sizes"),
    [("ling", {"cp": 2, "ep": 2, "etp": 2}), ("sala", {"cp": 4, "ep": 1, "etp": 1})],
)
def test_other_models_train_and_resume_on_other_ranks(model, sizes, tmp_path) -> None:
    """Its first steps on one rank; then half of them on four and the rest on two."""
    flags = ("--model", model, "--stop-after")
    expected = train(tmp_path / "one", *flags, "4", num_ranks=1, cp=1, ep=1, etp=1)
    train(tmp_path / "four", *flags, "2", num_ranks=4, **sizes)
    rows = train(tmp_path / "four", *flags, "4", "--resume", num_ranks=2, cp=2, ep=1, etp=1)
    assert_same_curve(rows, expected)


def test_contexts_grow_in_stages_with_another_cp(tmp_path) -> None:
    """From 4 to 512 tokens: the first stage over replicas, the others over cp."""
    flags = ("--base-context", "4", "--packs", "1", "--pack-tokens", "512", "--steps", "8")
    flags += ("--sample-tokens", "0", "--dtype", "float32")
    train(tmp_path, *flags, "--stop-after", "4", num_ranks=2, cp=1, ep=1, etp=1)
    rows = train(tmp_path, *flags, "--resume", num_ranks=2, cp=2, ep=1, etp=1)
    assert [row["step"] for row in rows] == list(range(8))
    long_losses = {row["step"]: row["long_loss"] for row in rows if "long_loss" in row}
    assert list(long_losses) == [3, 5, 6, 7]  # the last steps of the stages
    assert long_losses[7] < long_losses[3]  # that of the short model


def test_mixtures_move_and_pieces_have_their_lengths() -> None:
    stages = example("hybrid_training.stages")
    recipe, MINIMAX = stages.Recipe(4, 200, 1024, 0), stages.MINIMAX
    corpus = example("hybrid_training.corpus").Corpus.from_standard_library(0)
    begun, end = recipe.ends[:2]
    assert recipe.stage_at(begun - 1)[0] is MINIMAX[0]
    assert recipe.stage_at(begun) == (MINIMAX[1], MINIMAX[0].mixture)
    middle = recipe.stage_at(begun + round(0.1 * (end - begun)))[1]
    assert middle == pytest.approx((0.65, 0.35, 0.0), abs=0.02)
    assert recipe.stage_at(end - 1) == (MINIMAX[1], MINIMAX[1].mixture)
    (pack, again), (other, _) = (recipe.packs(corpus, step) for step in (199, 198))
    assert pack.document_lengths != again.document_lengths != other.document_lengths
    lengths = pack.document_lengths
    assert sum(lengths) == len(pack.tokens) == len(pack.labels) == 512
    assert sum(n for n in lengths if n >= 64) >= 0.3 * 512  # long documents, but for a rest of one
    assert (pack.labels == -100).sum() == len(lengths)


def test_lightning_example() -> None:
    printed = run("01_lightning.py")
    assert "same as alone: True" in printed
    assert "same in two calls: True" in printed


def script_on_rank(script: str) -> str:
    """What it prints, on ranks that have a group already."""
    printed = io.StringIO()
    with (
        redirect_stdout(printed),
        patch("lasp.launch.init_distributed", lambda: torch.device("cpu")),
        patch("torch.distributed.destroy_process_group"),
        torch.enable_grad(),  # some turn gradients off and leave them so
    ):
        runpy.run_path(str(EXAMPLES / script))
    return printed.getvalue()


def test_lightning_over_ranks_agrees_with_one_rank() -> None:
    """By the command of a reader."""
    assert_small_differences(run("02_lightning_ranks.py", num_ranks=2))


def test_the_ring_agrees_with_one_rank() -> None:
    assert_small_differences(run_on_ranks(script_on_rank, 4, "03_ring_packed.py")[0])


def assert_small_differences(printed: str) -> None:
    lines = printed.splitlines()
    errors = [float(line.split()[-1]) for line in lines if "largest difference" in line]
    assert len(errors) == 3
    assert max(errors) < 1e-5


def test_the_ring_on_one_screen_agrees_with_dense_attention() -> None:
    lines = run("07_ring_in_sixty_lines.py").splitlines()
    errors = [float(line.split()[-1]) for line in lines if "largest difference" in line]
    assert len(errors) == 1
    assert errors[0] < 1e-12


def test_moe_example() -> None:
    printed = run_on_ranks(script_on_rank, 4, "04_moe.py")[0]
    assigned = json.loads(printed.partition("ranks: ")[2].splitlines()[0])
    assert sum(assigned) == 4 * 512 * 2


def test_examples_use_public_names_only() -> None:
    for path in EXAMPLES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module not in (None, "__future__"):
                assert not any(alias.name.startswith("_") for alias in node.names), path
                assert not any(part.startswith("_") for part in str(node.module).split(".")), path


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_drop_by_probability_and_dropless(num_ranks: int, tmp_path) -> None:
    """The layer drops alike over ranks by every policy: tests/moe_parallel/test_layer.py."""
    for name, flags in {
        "probability": ("--drop-policy", "probability"),
        "dropless": ("--capacity-factor", "-1"),
    }.items():
        short = (*flags, "--stop-after", str(num_ranks), "--sample-tokens", "0")
        rows = train(tmp_path / name, *short, num_ranks=1, cp=1, ep=1, etp=1)
        assert (rows[0]["dropped_share"] > 0) == (name == "probability")
        if num_ranks > 1:
            over_ranks = train(tmp_path / f"{name}-2", *short, num_ranks=2, cp=2, ep=1, etp=2)
            assert_same_curve(over_ranks, rows)


def test_training_under_autocast_resumes(tmp_path) -> None:
    one = {"num_ranks": 1, "cp": 1, "ep": 1, "etp": 1}
    flags = ("--dtype", "bfloat16", "--sample-tokens", "0")
    expected = train(tmp_path / "whole", *flags, "--stop-after", "3", **one)
    train(tmp_path / "halves", *flags, "--stop-after", "2", **one)
    actual = train(tmp_path / "halves", *flags, "--stop-after", "3", "--resume", **one)
    assert_same_curve(actual, expected)


def test_resume_refuses_another_curve_or_nothing_to_resume(tmp_path) -> None:
    def refused(*args: str) -> str:
        arguments = arguments_of(tmp_path, *args, cp=1, ep=1, etp=1)
        return run_on_ranks(refusal, 1, train_on_rank, arguments)[0]

    assert "out must hold a checkpoint to resume" in refused("--resume")
    train(tmp_path, "--stop-after", "1", "--sample-tokens", "0", num_ranks=1, cp=1, ep=1, etp=1)
    assert "out must hold no checkpoints" in refused()
    assert "seed must be 0 as in the run to resume, got 1" in refused("--resume", "--seed", "1")
