"""Released files become a checkpoint that Megatron loads on any ranks, and what it saves files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from lasp.checkpoints import Options, convert, open_source, plan
from lasp.checkpoints.configs import config_fields
from lasp.hybrid import HybridConfig, HybridModel
from lasp.megatron import hybrid_block_spec, plain_weights
from tests.checkpoints.files import assert_same, random_tensors, read_files, write_files
from tests.megatron import block
from tests.megatron.attention import parallel_config
from tests.megatron.cpu import initialize
from tests.megatron.test_checkpoint import save
from tests.ranks import run_on_ranks

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel as MegatronHybridModel

    from lasp.megatron.hybrid_stack import hybrid_stack_spec
except ImportError:
    MegatronHybridModel = None

pytestmark = pytest.mark.megatron

VOCAB, EPSILON = 8, 1e-6
STEP = "iter_0000020"
SPLIT = {"tp": 2, "ep": 2, "pp": 2}
MODELS = {"minimax": {"hybrid": block.HYBRID}, **block.MODELS}
SHARED = {
    "vocab_size": VOCAB,
    "max_sequence_length": 0,
    "position_embedding_type": "none",
    "share_embeddings_and_output_weights": False,
}


def described(name: str) -> tuple[HybridConfig, dict[str, Any]]:
    """The model, as a released config can say it, and Megatron's options."""
    options = dict(MODELS[name])
    hybrid = options.pop("hybrid")
    hybrid = replace(
        hybrid,
        vocab_size=VOCAB,
        num_decay_layers=None,
        norm_eps=EPSILON,
        decay=hybrid.decay if isinstance(hybrid.decay, str) else "sala",
        lightning=replace(
            hybrid.lightning, norm_eps=EPSILON, rope_scaling=hybrid.attention.rope_scaling
        ),
    )
    return hybrid, block.OPTIONS | options | {"layernorm_epsilon": EPSILON}


def build(name: str, sizes: dict[str, int], groups: Any, symbols: str | None) -> torch.nn.Module:
    hybrid, options = described(name)
    stage = {
        "pre_process": groups.pp.rank() == 0,
        "post_process": groups.pp.rank() == groups.pp.size() - 1,
        "pg_collection": groups,
    }
    if symbols is None:
        config = parallel_config(sizes, **options)
        model = GPTModel(config, hybrid_block_spec(config, hybrid), **SHARED, **stage)
    else:
        options = options | {"num_layers": len(symbols.replace("|", ""))}
        config = parallel_config(sizes, **options)
        spec = hybrid_stack_spec(symbols, hybrid)
        model = MegatronHybridModel(config, spec, hybrid_layer_pattern=symbols, **SHARED, **stage)
    return model.to(torch.bfloat16)


def through_megatron(
    name: str, sizes: dict[str, int], folder: Path, out: Path, symbols: str | None = None
) -> None:
    """On a rank: load a checkpoint, compare, save another."""
    groups = initialize(**sizes)
    model = build(name, sizes, groups, symbols)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    sharded = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(sharded, str(folder))["model"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert all("_extra_state" in key for key in missing)
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    if symbols is None:  # by names and layouts that a person wrote, not by the tables
        plain = HybridModel.from_pretrained(folder.parents[1] / "in").state_dict()
        for key, weight in plain_weights([model], pg_collection=groups).items():
            assert torch.equal(weight, plain[key].to(weight.dtype)), key
    save(model.sharded_state_dict(), out)


def write_checkpoint(name: str, folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    hybrid, _ = described(name)
    file_format, fields = config_fields(hybrid)
    tensors = random_tensors(hybrid, file_format.name)
    write_files(folder / "in", tensors, fields)
    chosen = Options("megatron", **options)
    convert(plan(open_source(folder / "in"), chosen), folder / "start", chosen)
    (folder / "saved" / STEP).mkdir(parents=True)
    (folder / "saved" / "latest_checkpointed_iteration.txt").write_text("20")
    return folder / "start" / "release", tensors


@pytest.mark.parametrize(
    "name",
    ["ling", *(pytest.param(name, marks=pytest.mark.slow) for name in ("minimax", "ring", "sala"))],
)
def test_over_tensor_expert_and_pipeline_ranks(name: str, tmp_path: Path) -> None:
    start, tensors = write_checkpoint(name, tmp_path)
    saved = tmp_path / "saved"
    whole, parts = (
        HybridModel.from_pretrained(tmp_path / at).state_dict() for at in ("in", "start")
    )
    assert_same(parts, whole)
    sizes = {axis: size for axis, size in SPLIT.items() if axis != "ep" or name != "sala"}
    run_on_ranks(through_megatron, 4, name, sizes, start, saved / STEP)
    back = Options("hf")
    config = tmp_path / "in" / "config.json"
    convert(plan(open_source(saved, config), back), tmp_path / "out", back)
    assert_same(read_files(tmp_path / "out"), tensors)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        config.read_text()
    )


@pytest.mark.skipif(MegatronHybridModel is None, reason="needs megatron-core >= 0.18")
def test_hybrid_model_of_megatron(tmp_path: Path) -> None:
    start, tensors = write_checkpoint("minimax", tmp_path, megatron_model="hybrid")
    pattern = "GE*E|GE*E"  # a pipeline stage each
    run_on_ranks(through_megatron, 4, "minimax", SPLIT, start, tmp_path / "saved" / STEP, pattern)
    back = Options("hf")
    source = open_source(tmp_path / "saved", tmp_path / "in" / "config.json")
    convert(plan(source, back), tmp_path / "out", back)
    assert_same(read_files(tmp_path / "out"), tensors)


def padded(folder: Path, out: Path) -> None:
    """A model whose vocabulary is padded, as Megatron's trainers pad it."""
    groups = initialize()
    hybrid, options = described("minimax")
    config = parallel_config({}, **options)
    shared = SHARED | {"vocab_size": VOCAB + 5}
    model = GPTModel(config, hybrid_block_spec(config, hybrid), **shared, pg_collection=groups)
    model = model.to(torch.bfloat16)
    sharded = {"model": model.sharded_state_dict()}
    model.load_state_dict(dist_checkpointing.load(sharded, str(folder))["model"], strict=False)
    save(model.sharded_state_dict(), out)


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    start, tensors = write_checkpoint("minimax", tmp_path)
    run_on_ranks(padded, 1, start, tmp_path / "saved" / STEP)
    back = Options("hf")
    source = open_source(tmp_path / "saved", tmp_path / "in" / "config.json")
    convert(plan(source, back), tmp_path / "out", back)
    assert_same(read_files(tmp_path / "out"), tensors)
