from __future__ import annotations

import importlib
import subprocess
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks import harness, many_gpus


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_each_command_is_one_that_its_benchmark_takes(gpus: int) -> None:
    pytest.importorskip("tyro")
    options = many_gpus.Options(commit="abc")
    for item, command in many_gpus.commands(options, gpus):
        if item in ("tests", "Megatron"):
            continue
        at = command.index("--nproc-per-node")
        assert int(command[at + 1]) == gpus
        name, *arguments = command[at + 3 :]
        question = importlib.import_module(name).QUESTION
        assert harness.parse(question.options, "", arguments).commit == "abc"


def test_what_ended_well_is_not_run_again(tmp_path: Path) -> None:
    options = many_gpus.Options(commit="abc", out=tmp_path, gpus=4)
    asked: list[str] = []

    class Process:
        """One benchmark of the ring hangs until it is ended, one goes wrong."""

        def __init__(self, command: list[str]) -> None:
            asked.append(" ".join(command))
            self.hangs = "ring_packed" in asked[-1]

        def wait(self, timeout: float | None = None) -> int:
            if self.hangs:
                raise subprocess.TimeoutExpired("", timeout or 0.0)
            return int("ring_length" in asked[-1])

        def terminate(self) -> None:
            self.hangs = False

    popen = patch.object(many_gpus.subprocess, "Popen", Process)
    with popen, patch.object(many_gpus.importlib.util, "find_spec", return_value=None):
        assert many_gpus.main(options) == 2
        first = len(asked)
        assert many_gpus.main(options) == 2
    assert first == 9
    assert len(asked) == 11  # the two that did not end well
    assert many_gpus.finished(tmp_path / "many-gpus-4.done") >= {"abc tests", "abc lightning"}


def test_one_gpu_is_too_few() -> None:
    with pytest.raises(SystemExit, match="needs two GPUs or more, found 1"):
        many_gpus.main(many_gpus.Options(commit="abc", gpus=1))
