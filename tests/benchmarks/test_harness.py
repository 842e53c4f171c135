from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks import harness, report

RESULTS = Path(__file__).parents[2] / report.RESULTS


def committed_commands() -> list[str]:
    lines = (line for path in RESULTS.glob("*.jsonl") for line in path.read_text().splitlines())
    return sorted({json.loads(line)["command"] for line in lines})


def test_the_commands_of_the_rows_still_work() -> None:
    pytest.importorskip("tyro")
    pytest.importorskip("triton")
    checked = set()
    for command in committed_commands():
        _, _, rest = command.partition("-m benchmarks.")
        name, *arguments = shlex.split(rest)
        if name == "before_after":  # compares trees, and has options of its own
            continue
        question = importlib.import_module(f"benchmarks.{name}").QUESTION
        options = harness.parse(question.options, "", arguments)
        assert question.name == name
        assert options.commit == arguments[arguments.index("--commit") + 1]
        checked.add(name)
    assert checked == {
        "generation", "host_time", "hybrid_layers", "hybrid_train", "kept_activations",
        "lasp_ranks", "lasp_wire", "lightning_decode", "lightning_kernels", "lightning_layer",
        "lightning_length", "moe_against_tp", "moe_host", "moe_overlap", "needle", "ring_host",
        "ring_kinds", "ring_length", "ring_packed", "state_hop",
    }  # fmt: skip


def test_a_row_has_percentiles_of_samples_or_one_value() -> None:
    many = harness.row("b", {"n": 1}, "us", "t_ms", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], "ms")
    assert (many["p20"], many["p50"], many["p80"], many["samples"]) == (2.0, 3.0, 5.0, 6)
    one = harness.row("b", {"n": 1}, "us", "share", 0.5, "share", samples=1, bound=0.25)
    assert (one["p20"], one["p50"], one["p80"], one["samples"]) == (None, 0.5, None, 1)
    assert harness.printed(many).split() == ["us", "n=1", "t_ms", "3", "ms"]
    assert "= 2.000 x" in harness.printed(one)


def test_a_wrong_result_ends_the_run() -> None:
    exact = [torch.ones(4, dtype=torch.float64)]
    harness.check("right", [torch.full((4,), 1.005)], exact)
    with pytest.raises(SystemExit, match="wrong is wrong here: result 0"):
        harness.check("wrong", [torch.full((4,), 1.02)], exact)
    with pytest.raises(SystemExit, match="not a number"):
        harness.check("not a number", [torch.full((4,), float("nan"))], exact)
