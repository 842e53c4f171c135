"""The quick start of the documents, in small."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="needs the extra hf")
pytest.importorskip("tyro", reason="needs the extra examples")

from lasp.checkpoints import Options, convert, open_source, plan
from lasp.generate import main

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_it_trains_and_the_commands_read_what_it_saved(tmp_path, capsys, monkeypatch) -> None:
    folder, options = tmp_path / "run/model", Options(to="plain")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = EXAMPLES / "00_quick_start.py"
    flags = ["--steps", "2", "--tokens", "256", "--out", str(folder)]
    monkeypatch.setattr("sys.argv", [str(script), *flags])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "step 2: mean loss" in printed
    assert "def main(" in printed

    main([str(folder), "def main(", "--max-new-tokens", "2", "--device", "cpu"])
    assert "9 tokens read" in capsys.readouterr().out
    convert(plan(open_source(folder), options), tmp_path / "plain", options)
    assert (tmp_path / "plain").is_dir()
