"""Conversions there and back keep every bit, within their memory, whole or not at all."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from lasp.checkpoints import Options, convert, open_source, plan
from lasp.checkpoints.__main__ import main
from lasp.hybrid import HybridModel
from tests.checkpoints.files import (
    INDEX,
    MODELS,
    assert_same,
    random_tensors,
    read_files,
    write_files,
    write_model,
)

IN_MEGATRON = [model for model in MODELS if model not in ("ling-mtp", "minimax-native")]


def converted(source: Path, out: Path, **options: Any) -> Path:
    chosen = Options(**options)
    convert(plan(open_source(source), chosen), out, chosen)
    return out


@pytest.mark.parametrize(
    ("model", "options"),
    [(model, {"to": "plain"}) for model in MODELS]
    + [
        (model, {"to": "megatron", "megatron_model": megatron_model})
        for model in IN_MEGATRON
        for megatron_model in ("gpt", "hybrid")
    ],
)
def test_there_and_back(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in", model)
    there = converted(tmp_path / "in", tmp_path / "there", **options)
    assert not list(there.glob("*.safetensors"))
    back = converted(there, tmp_path / "back", to="hf", shard_bytes=20_000)
    assert_same(read_files(back), tensors)
    for name in ("config.json", "tokenizer.json"):
        written, given = (json.loads((tmp_path / at / name).read_text()) for at in ("back", "in"))
        assert written == given
    index = json.loads((back / INDEX).read_text())
    sizes = [tensor.nbytes for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    header_bytes = 20_000
    for file in files:
        assert (back / file).stat().st_size <= max(20_000, *sizes) + header_bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "in", "there"]


def test_large_tensors_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lasp.checkpoints.mapping.PIECE_BYTES", 700)
    tensors = write_model(tmp_path / "in", "ring")
    there = converted(tmp_path / "in", tmp_path / "there", to="megatron")
    assert_same(read_files(converted(there, tmp_path / "back", to="hf")), tensors)
    again = converted(there, tmp_path / "again", to="plain")
    assert_same(read_files(converted(again, tmp_path / "files", to="hf")), tensors)


def test_from_one_format_of_files_to_another(tmp_path: Path) -> None:
    """transformers' names are MiniMax's; its decay buffers go, the config is another."""
    tensors = write_model(tmp_path / "in", "minimax-native")
    fields = json.loads((tmp_path / "in" / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    decay = {
        f"model.layers.0.self_attn.{name}": torch.ones(2)
        for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    }
    write_files(tmp_path / "decay", tensors | decay, fields)
    out = converted(tmp_path / "decay", tmp_path / "out", to="hf", format="minimax")
    assert_same(read_files(out), tensors)
    written = json.loads((out / "config.json").read_text())
    assert written["architectures"] == ["MiniMaxText01ForCausalLM"]
    assert written["rotary_dim"] == 8
    assert written["torch_dtype"] == "bfloat16"
    again = converted(out, tmp_path / "again", to="hf", format="minimax-native")
    assert json.loads((again / "config.json").read_text()) == fields


def test_text_tower_of_images_and_text(tmp_path: Path) -> None:
    """MiniMax-VL-01's names have a prefix; its vision tower is left out."""
    tensors = write_model(tmp_path / "in")
    text = json.loads((tmp_path / "in" / "config.json").read_text())
    fields = {"architectures": ["MiniMaxVL01ForConditionalGeneration"], "text_config": text}
    named = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    vision = {"vision_tower.vision_model.post_layernorm.weight": torch.ones(3)}
    vision |= {"multi_modal_projector.linear_1.bias": torch.ones(3), "image_newline": torch.ones(3)}
    write_files(tmp_path / "vl", named | vision, fields)
    plain = converted(tmp_path / "vl", tmp_path / "plain", to="plain")
    out = converted(plain, tmp_path / "out", to="hf")
    assert_same(read_files(out), tensors)
    assert json.loads((out / "config.json").read_text()) == text


@pytest.mark.parametrize("kept", [False, True])
def test_routers_of_trainers_get_the_dtype_of_the_rest(kept: bool, tmp_path: Path) -> None:
    """A float32 router that the files had stays; one that a trainer made float32 does not."""
    config, name = MODELS["minimax"]
    tensors = random_tensors(config, name)
    write_model(tmp_path / "in")
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    routers = {n: t.float() for n, t in tensors.items() if n.endswith("moe.gate.weight")}
    write_files(tmp_path / "wide", tensors | routers, fields)
    plain = converted(tmp_path / "wide", tmp_path / "plain", to="plain")
    if not kept:  # as a trainer's own checkpoint, which says nothing of its files
        (plain / "config.json").write_text(json.dumps(fields))
    assert_same(
        read_files(converted(plain, tmp_path / "out", to="hf")),
        tensors | routers if kept else tensors,
    )
    forced = converted(plain, tmp_path / "forced", to="hf", float32_routers=True)
    assert_same(read_files(forced), tensors | routers)


def test_another_dtype(tmp_path: Path) -> None:
    """What was trained in float32 becomes bfloat16, but for what chooses experts."""
    tensors = write_model(tmp_path / "in", "ring")
    fields = json.loads((tmp_path / "in" / "config.json").read_text())
    write_files(tmp_path / "wide", {n: t.float() for n, t in tensors.items()}, fields)
    plain = converted(tmp_path / "wide", tmp_path / "plain", to="plain")
    for source in (plain, tmp_path / "wide"):
        out = converted(source, tmp_path / f"{source.name}-out", to="hf", dtype="bfloat16")
        assert_same(read_files(out), tensors)
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_plain_is_a_checkpoint_of_torch(tmp_path: Path) -> None:
    """A model loads it by torch's own function, and what torch saves converts."""
    tensors = write_model(tmp_path / "in", "ring")
    plain = converted(tmp_path / "in", tmp_path / "plain", to="plain")
    model = HybridModel(MODELS["ring"][0], dtype=torch.bfloat16)
    state = model.state_dict()
    weights = {name: value for name, value in state.items() if "tokens_per" not in name}
    dcp.load({"model": weights}, checkpoint_id=plain, no_dist=True)
    loaded = HybridModel.from_pretrained(tmp_path / "in")
    assert_same({n: v for n, v in loaded.state_dict().items() if n in weights}, weights)
    loaded = HybridModel.from_pretrained(plain)
    assert_same({n: v for n, v in loaded.state_dict().items() if n in weights}, weights)
    saved = {"model": state, "optimizer": {"state": torch.ones(3)}}
    dcp.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    (tmp_path / "saved" / "config.json").write_text((plain / "config.json").read_text())
    assert_same(read_files(converted(tmp_path / "saved", tmp_path / "out", to="hf")), tensors)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "in")
    where = [str(tmp_path / "in"), str(tmp_path / "out")]
    main(["convert", *where, "--to", "plain", "--dry-run"])
    printed = capsys.readouterr().out
    assert "minimax, 79 tensors -> plain, 39 tensors, 80,640 bytes" in printed
    assert "memory: at most" in printed
    assert not (tmp_path / "out").exists()
    main(["convert", *where, "--to", "plain"])
    assert (tmp_path / "out" / ".metadata").exists()
    with pytest.raises(SystemExit, match="error: the folder to write must not be there yet"):
        main(["convert", *where, "--to", "plain"])


KILLED = """
import os, signal, sys
import lasp.checkpoints.mapping as mapping
from lasp.checkpoints.__main__ import main

join, count = mapping.MappedTensor.joined, iter(range(100))

def joined(self, atoms):
    if next(count) == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return join(self, atoms)

mapping.MappedTensor.joined = joined
main(sys.argv[1:])
"""


@pytest.mark.parametrize("to", ["hf", pytest.param("plain", marks=pytest.mark.slow)])
def test_killed_half_way_leaves_nothing_that_looks_whole(to: str, tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in")
    arguments = ["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to]
    arguments += ["--shard-bytes", "10000"]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (left,) = (path for path in tmp_path.iterdir() if path.name != "in")
    assert list(left.iterdir())
    with pytest.raises(ValueError, match=r"must have a config\.json"):
        open_source(left)
    main(arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    out = tmp_path / "out"
    assert_same(read_files(converted(out, tmp_path / "back", to="hf")), tensors)


def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "in")

    def fail(*_: object) -> Tensor:
        raise OSError("no space left on device")

    monkeypatch.setattr("lasp.checkpoints.mapping.MappedTensor.joined", fail)
    with pytest.raises(OSError, match="no space"):
        converted(tmp_path / "in", tmp_path / "out", to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
