"""Calls that cannot be answered end in one clear error, and nothing is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lasp.checkpoints import FORMATS, Options, convert, open_source, plan
from lasp.hybrid import HybridModel
from tests.checkpoints.files import MODELS, write_model
from tests.checkpoints.test_bad_input import Break, with_tensor

GATE = "model.layers.0.self_attn.output_gate.weight"


def converted(folder: Path, out: Path, options: Options) -> None:
    convert(plan(open_source(folder), options), out, options)


def saved(folder: Path, **options: Any) -> None:
    HybridModel.from_pretrained(folder).save_pretrained(folder.with_name("out"), **options)


def two_dtypes(folder: Path) -> None:
    with_tensor(GATE, torch.ones(32, 32))(folder)
    converted(folder, folder.with_name("out"), Options("megatron"))


def of_other_heads(folder: Path) -> None:
    config = MODELS["minimax"][0]
    other = replace(config, attention=replace(config.attention, rope_base=5.0))
    HybridModel.from_pretrained(folder, config=other)


CALLS: dict[str, tuple[Break, str]] = {
    "OUT is there": (
        lambda folder: converted(folder, folder, Options("hf")),
        "the folder to write must not be there yet, got .*: name another",
    ),
    "OUT is in no folder": (
        lambda folder: converted(folder, folder / "no" / "out", Options("hf")),
        "the folder to write must be in one that is there",
    ),
    "IN is not there": (
        lambda folder: open_source(folder / "no"),
        "the folder to read must be there",
    ),
    "shards of no bytes": (
        lambda _: Options("hf", shard_bytes=0),
        "shard_bytes must be an",
    ),
    "an unknown target": (lambda _: Options("gguf"), "to must be one of"),
    "a format of another model": (
        lambda folder: plan(open_source(folder), Options("hf", format="sala")),
        "config must be of a model that a format has: sala: the model must have dense MLPs",
    ),
    "rotation that transformers has not": (
        lambda folder: plan(open_source(folder), Options("hf", format="minimax-native")),
        "attention.rotary_dim must be 8 in the format minimax-native, got 4",
    ),
    "two dtypes in one tensor": (
        two_dtypes,
        r"lightning\.gate of layer 0 must be of one dtype to be decoder\.layers\.0\.self_attention"
        r"\.in_proj\.weight, got \['torch\.bfloat16', 'torch\.float32'\]",
    ),
    "a config of other weights": (
        of_other_heads,
        r"attention\.rope_base must be 10000000\.0 in config\.json, got 5\.0",
    ),
    "saved where something is": (
        lambda folder: HybridModel.from_pretrained(folder).save_pretrained(folder),
        "the folder to write must not be there yet",
    ),
    "saved in an unknown format": (
        lambda folder: saved(folder, format="llama"),
        "format must be one of",
    ),
    "saved like nothing": (
        lambda folder: saved(folder, like=folder / "no"),
        r"must have a config\.json",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls(case: str, tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "in")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_config_without_any_field_names_one(name: str) -> None:
    file_format = FORMATS[name]
    with pytest.raises(ValueError, match=r"config\.json must have"):
        file_format.read({"architectures": file_format.classes[:1]})


def test_prediction_of_the_token_after_the_next_is_not_in_megatron(tmp_path: Path) -> None:
    write_model(tmp_path / "in", "ling-mtp")
    with pytest.raises(ValueError, match=r"format megatron-gpt has names for, got .* mtp\."):
        plan(open_source(tmp_path / "in"), Options("megatron"))


def test_models_in_pieces_are_not_saved(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    model = HybridModel.from_pretrained(tmp_path / "in")
    model.layers[0].moe_norm.weight = torch.nn.Parameter(torch.ones(16))
    with pytest.raises(ValueError, match=r"layers\.0\.moe_norm\.weight must be whole, or cut over"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("model", "name"), [("minimax", "minimax"), ("ling", "bailing"), ("sala", "sala")]
)
def test_rotations_are_read_as_transformers_5_writes_them(model: str, name: str) -> None:
    """In ``rope_parameters``, with the base beside the scaling."""
    file_format = FORMATS[name]
    fields = file_format.write(MODELS[model][0])
    fields["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    expected = file_format.read(fields)
    scaled = fields.pop("rope_scaling") | {"rope_theta": fields["rope_theta"]}
    assert file_format.read({**fields, "rope_parameters": scaled}) == expected
    outside = {name: value for name, value in fields.items() if name != "rope_theta"}
    assert file_format.read({**outside, "rope_parameters": scaled}) == expected
    scaled["rope_theta"] *= 2
    with pytest.raises(ValueError, match=r"rope_theta of rope_parameters must be that of config"):
        file_format.read({**fields, "rope_parameters": scaled})
    with pytest.raises(ValueError, match=r"config\.json must have rope_theta"):
        file_format.read({**fields, "rope_theta": None})
    with pytest.raises(ValueError, match=r"rope_scaling of config\.json must be a table"):
        file_format.read({**fields, "rope_scaling": "yarn"})


@pytest.mark.parametrize(("model", "name"), [("ling", "bailing"), ("sala", "sala")])
@pytest.mark.parametrize("field", [{"hidden_act": "gelu"}, {"use_sliding_window": True}])
def test_other_models_refuse_by_the_field_too(
    model: str, name: str, field: dict[str, object]
) -> None:
    file_format = FORMATS[name]
    fields = file_format.write(MODELS[model][0])
    file_format.read(fields)
    with pytest.raises(ValueError, match=rf"{next(iter(field))} of config.json must be"):
        file_format.read({**fields, **field})
