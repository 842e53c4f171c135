from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import before_after, operator_calls
from benchmarks.harness import environment


class Fake:
    """A tree whose device grows slower with every sample, as one that grows warmer does."""

    warmth = 1.0

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def ask(self, **request):
        if "build" in request:
            return [{"lightning forward": (7, 9.5), "host lightning forward": (3, 1.5)}]
        Fake.warmth += 0.001
        assert request["settings"] == {"l": (7, 9.5), "h": (3, 1.5)}[request["time"][0]]
        # The slowest rank counts.
        return [self.factor * Fake.warmth, self.factor * Fake.warmth / 2]


def test_ratios_are_of_the_same_round(capsys) -> None:
    trees = {"before": Fake(2.0), "now": Fake(2.1)}
    rows = list(before_after.compare(trees, "lightning layer 0", rounds=9))
    assert [row["metric"] for row in rows] == ["device_ms"] * 2 + ["host_us"] * 2
    for row in rows:
        assert row["ratio"] == pytest.approx(1.05, abs=0.002)
        assert row["samples"] == 9
    # Only the device time of an operator is a bar.
    marked = [line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line]
    assert len(marked) == 1
    assert marked[0].startswith("lightning forward")


class Ended(Fake):
    """A tree whose processes are ended at the second operator."""

    def __init__(self, path: Path, ranks: int) -> None:
        super().__init__(1.0)

    def ask(self, **request):
        if request.get("build") == "second":
            raise SystemExit("a process ended")
        return super().ask(**request)


def test_what_was_measured_is_written_though_the_run_ends_early(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(before_after, "Tree", Ended)
    monkeypatch.setattr(before_after, "environment", lambda _: environment("c0ffee", "cpu"))
    monkeypatch.setattr(operator_calls, "builders", lambda _: ["first", "second"])
    options = ["before", "--before-commit", "decaf", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["before_after", *options])
    with pytest.raises(SystemExit, match="a process ended"):
        before_after.main()
    (path,) = tmp_path.iterdir()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["impl"] for row in rows] == ["before", "now"] * 2
    assert {(row["commit"], row["before_commit"]) for row in rows} == {("c0ffee", "decaf")}


def test_calls_come_from_the_tree_alone(tmp_path) -> None:
    """The process that times imports no ``benchmarks``, whose names the other tree may not have."""
    (tmp_path / "lasp.py").write_text("")
    code = (
        f"import runpy, sys; names = runpy.run_path({operator_calls.__file__!r});"
        " import lasp; print(lasp.__file__); assert 'benchmarks' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(result.stdout.strip()) == tmp_path / "lasp.py"


@pytest.mark.gpu
def test_a_tree_times_its_operators() -> None:
    tree = before_after.Tree(Path(), 1)
    (settings,) = tree.ask(build="layer")
    (taken,) = tree.ask(time="decode batch 64", settings=settings["decode batch 64"])
    tree.close()
    # It reads and writes 64 states of 4 MiB: no GPU does that in 10 us.
    assert 0.01 < taken < 10
