"""Broken files and calls end in one clear error, and nothing is written."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lasp.checkpoints import Options, convert, open_source, plan
from lasp.hybrid import HybridModel
from tests.checkpoints.files import INDEX, read_files, write_files, write_model

Break = Callable[[Path], Any]
FIRST, SECOND = (f"model-{n:05}-of-00002.safetensors" for n in (1, 2))
NORM = "model.norm.weight"


def edit_json(name: str, **changes: Any) -> Break:
    """Change fields of a JSON file; None takes one away."""

    def edit(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        for key, value in changes.items():
            fields.pop(key)
            if value is not None:
                fields[key] = value
        (folder / name).write_text(json.dumps(fields))

    return edit


def add_field(**fields: Any) -> Break:
    def edit(folder: Path) -> None:
        known = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(known | fields))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Break:
    """Write both shards again, with their index, after a change of the tensors."""

    def edit(folder: Path) -> None:
        tensors = read_files(folder)
        fields = json.loads((folder / "config.json").read_text())
        change(tensors)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        write_files(folder, tensors, fields)

    return edit


def with_tensor(name: str, tensor: Tensor) -> Break:
    return edit_tensors(lambda tensors: tensors.__setitem__(name, tensor))


def cut_short(name: str, size: int) -> Break:
    def cut(folder: Path) -> None:
        held = (folder / name).read_bytes()
        (folder / name).write_bytes(held[: size if size >= 0 else len(held) + size])

    return cut


def edit_bytes(name: str, old: bytes, new: bytes) -> Break:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes().replace(old, new))

    return edit


def text(name: str, content: str) -> Break:
    return lambda folder: (folder / name).write_text(content)


def without(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def move(name: str, *, keep: bool, index: bool) -> Break:
    """Put a tensor of one shard into the other too, or away; and into the index, or not."""

    def edit(folder: Path) -> None:
        known = json.loads((folder / INDEX).read_text())
        shard = known["weight_map"][name]
        other = SECOND if shard == FIRST else FIRST
        tensors = read_files(folder)
        of = {s: {n: tensors[n] for n, at in known["weight_map"].items() if at == s}
              for s in (FIRST, SECOND)}  # fmt: skip
        if keep:
            of[other][name] = tensors[name]
        else:
            del of[shard][name]
        if not index:
            del known["weight_map"][name]
        for file, held in of.items():
            save_file(held, folder / file)
        (folder / INDEX).write_text(json.dumps(known))

    return edit


def as_checkpoint(then: Break) -> Break:
    """The folder as torch's checkpoint, broken."""

    def edit(folder: Path) -> None:
        options = Options("plain")
        made = folder.with_name("made")
        convert(plan(open_source(folder), options), made, options)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        made.rename(folder)
        then(folder)

    return edit


BROKEN: dict[str, tuple[Break, str]] = {
    "a tensor that is not mapped": (
        with_tensor("model.layers.0.shared_mlp.up_proj.weight", torch.ones(2, 2)),
        r"must hold the model of its config\.json, got besides 1 tensors: model\.layers\.0\.shared",
    ),
    "a missing tensor": (
        edit_tensors(lambda tensors: tensors.pop(NORM)),
        r"must hold all of the model, missing 1 tensors: model\.norm\.weight",
    ),
    "a layer too many": (
        with_tensor("model.layers.4.input_layernorm.weight", torch.ones(32)),
        r"got besides 1 tensors: model\.layers\.4",
    ),
    "another shape": (
        with_tensor(NORM, torch.ones(31)),
        r"model\.norm\.weight must have shape \(32,\) by config\.json, got \(31,\) in model-",
    ),
    "an embedding that is padded": (
        with_tensor("model.embed_tokens.weight", torch.ones(48, 32)),
        r"model\.embed_tokens\.weight must have shape \(40, 32\)",
    ),
    "integers": (
        with_tensor(NORM, torch.ones(32, dtype=torch.int8)),
        r"model\.norm\.weight in model-.* must be of \['BF16', .*got I8: quantised",
    ),
    "a shard cut short": (
        cut_short(FIRST, -10),
        rf"{FIRST} must be a whole safetensors file, got \d+ bytes .*download it again",
    ),
    "a shard cut in its header": (cut_short(FIRST, 100), f"{FIRST} must be a whole"),
    "an empty shard": (cut_short(FIRST, 0), f"{FIRST} must be a whole .* got 0 bytes"),
    "a shard that is text": (text(FIRST, "not found"), f"{FIRST} must be a whole"),
    "an absent shard": (
        without(SECOND),
        f"must name shards that are there, got {SECOND}, which is not",
    ),
    "a tensor twice": (
        move(NORM, keep=True, index=True),
        rf"got {NORM} besides, which the index has in|{NORM} must be in one shard",
    ),
    "a tensor that the index has not": (
        move(NORM, keep=True, index=False),
        f"must hold what {INDEX} says, got {NORM} besides, which the index has in no shard",
    ),
    "a tensor that the index has alone": (
        move(NORM, keep=False, index=True),
        rf"must hold {NORM} as {INDEX} says, got a file without it \(1 such",
    ),
    "an index that is no JSON": (text(INDEX, '{"weight_map": '), f"{INDEX} must be JSON"),
    "an index without a map": (text(INDEX, "{}"), f"{INDEX} must have a weight_map"),
    "no index": (without(INDEX), rf"must have {INDEX} or model\.safetensors, got neither"),
    "no config": (without("config.json"), r"must have a config\.json, got none there"),
    "a config that is a list": (text("config.json", "[]"), "must be a JSON object, got a list"),
    "a config without a field": (
        edit_json("config.json", num_local_experts=None, rotary_dim=None),
        r"config\.json must have rotary_dim, got none in one of \['MiniMaxText01ForCausalLM'\]",
    ),
    "a config of another class": (
        edit_json("config.json", architectures=["BailingMoeV3ForCausalLM"]),
        r"architectures of config\.json must be one of .*, got \['BailingMoeV3ForCausalLM'\]",
    ),
    "another number of layers": (
        edit_json("config.json", num_hidden_layers=5),
        "pattern must be .* 5 of G",
    ),
    "an unknown kind of layer": (
        edit_json("config.json", attn_type_list=[0, 0, 0, 2]),
        r"attn_type_list must be among \[0, 1\], got 2",
    ),
    "another activation": (
        edit_json("config.json", hidden_act="gelu"),
        r"hidden_act of config\.json must be 'silu', got 'gelu'",
    ),
    "a sliding window": (add_field(sliding_window=64), "sliding_window of config.json must be 0"),
    "pre-norm": (edit_json("config.json", postnorm=False), "postnorm of config.json must be True"),
    "a shared expert": (
        edit_json("config.json", shared_intermediate_size=[0, 64]),
        "shared_intermediate_size of config.json must be 0",
    ),
    "quantised weights": (
        add_field(quantization_config={"bits": 4}),
        "quantization_config of config.json must be missing",
    ),
    "positions scaled otherwise": (
        add_field(rope_scaling={"type": "longrope", "factor": 2.0}),
        "rope_type must be 'linear' or 'yarn', got 'longrope'",
    ),
    "positions scaled by what is unknown": (
        add_field(rope_scaling={"rope_type": "yarn", "factor": 2.0, "long_factor": [1.0]}),
        r"rope_scaling of config\.json must be of .*, got \['long_factor'\] besides",
    ),
    "a shard of another folder": (
        edit_json(INDEX, weight_map={NORM: "../../model.safetensors"}),
        rf"{INDEX} must name files of its own folder, got '../../model\.safetensors'",
    ),
    "a shard by its path": (
        edit_json(INDEX, weight_map={NORM: "/tmp/model.safetensors"}),
        "must name files of its own folder, got '/tmp/model",
    ),
    "a newest step in another folder": (
        text("latest_checkpointed_iteration.txt", "../elsewhere"),
        "latest_checkpointed_iteration.txt must name files of its own folder",
    ),
    "two checkpoints": (text(".metadata", ""), "must hold one checkpoint, got model"),
    "a run of Megatron without its newest step": (
        text("latest_checkpointed_iteration.txt", "20\n"),
        "latest_checkpointed_iteration.txt must name a folder there, got iter_0000020",
    ),
    "a checkpoint of torch cut short": (
        as_checkpoint(cut_short("__0_0_0.distcp", -1)),
        r"__0_0_0\.distcp must have \d+ bytes as \.metadata says, got \d+: the checkpoint was not",
    ),
    "a checkpoint of torch without its file": (
        as_checkpoint(without("__0_0_0.distcp")),
        r"__0_0_0\.distcp must have \d+ bytes .* got 0",
    ),
    "a checkpoint of torch with a file of another folder": (
        as_checkpoint(edit_bytes(".metadata", b"__0_0_0.distcp", b"../_0_0.distcp")),
        r"\.metadata must name files of its own folder, got '\.\./_0_0\.distcp'",
    ),
    "a checkpoint of torch that names a function": (
        as_checkpoint(lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(os.system))),
        r"must name torch's records of tensors alone, got \w+\.system, which could run code",
    ),
    "a checkpoint of torch that is not finished": (
        as_checkpoint(cut_short(".metadata", 100)),
        "must be that of a finished checkpoint, got one that ends early",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    damage, message = BROKEN[case]
    damage(tmp_path / "in")
    options = Options("hf")
    with pytest.raises(ValueError, match=message):
        convert(plan(open_source(tmp_path / "in"), options), tmp_path / "out", options)
    with pytest.raises(ValueError, match=message):
        HybridModel.from_pretrained(tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
