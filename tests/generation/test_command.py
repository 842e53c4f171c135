"""``python -m lasp.generate`` prints what the model continues, and says how it read the prompt."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="needs the extra hf")
pytest.importorskip("tyro", reason="needs the extra hf")

from lasp.generate import codec_of, main
from lasp.hybrid import HybridModel, Residuals
from tests.test_hybrid import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "files"
    shape = replace(config(), vocab_size=256, num_layers=8, pattern="7:1", residuals=None)
    model = HybridModel(replace(shape, residuals=Residuals.deepnorm(8)), dtype=torch.float32)
    model.reset_parameters(0)
    model.save_pretrained(path, format="minimax")
    return path


def expected(folder: Path, ids: list[int], count: int) -> list[int]:
    return HybridModel.from_pretrained(folder).generate([ids], max_new_tokens=count).tokens[0]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main([*arguments, "--device", "cpu"])
    return capsys.readouterr().out


def test_ids_and_bytes_without_a_tokenizer(folder: Path, capsys) -> None:
    told = printed(capsys, str(folder), "5 7 250", "--max-new-tokens", "6")
    assert "ids (no tokenizer.json)" in told
    assert "5 7 250 " + " ".join(map(str, expected(folder, [5, 7, 250], 6))) in told
    assert "3 tokens read" in told
    assert "6 new" in told
    told = printed(capsys, str(folder), "ab c", "--max-new-tokens", "2", "--temperature", "1")
    assert "bytes (no tokenizer.json)" in told
    assert "4 tokens read" in told


def test_a_tokenizer_of_the_folder_is_used(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="needs tokenizers: pip install --group oracles")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"b": 1, "a": 2, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = codec_of(tmp_path, "a b")
    assert codec.name == "tokenizer.json"
    assert codec.encode("a b x") == [2, 1, 0]
    assert codec.decode([1, 2]) == "b a"


def test_a_bad_prompt_or_folder_ends_with_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: tokens must be ids in"):
        main([str(folder), "256", "--device", "cpu"])
    with pytest.raises(SystemExit, match="error: "):
        main([str(tmp_path), "a", "--device", "cpu"])


@pytest.mark.slow
def test_over_ranks_it_prints_once(folder: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["--nproc-per-node", "2", "-m", "lasp.generate", str(folder), "5 7 250"]
    done = subprocess.run(
        [*launcher, *command, "--max-new-tokens", "6", "--device", "cpu"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.count("3 tokens read") == 1
    assert " ".join(map(str, expected(folder, [5, 7, 250], 6))) in done.stdout
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 256
