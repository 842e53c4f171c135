"""Files that transformers wrote are read, and files that are written here it reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lasp.checkpoints import Options, convert, open_source, plan
from lasp.hybrid import HybridModel, pack_batch
from tests.checkpoints.files import INDEX, MODELS, read_files
from tests.closeness import relative_error

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install --group oracles"
)
minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")

DECAY = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
TOKENS = torch.arange(70) * 7 % 40
OPTIONS = {"attn_implementation": "sdpa", "experts_implementation": "eager"}


def their_model() -> nn.Module:
    """Half the files' fields are not transformers' defaults."""
    config = transformers.MiniMaxConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts_per_tok=2,
        num_local_experts=4,
        layer_types=["linear_attention"] * 2 + ["full_attention", "linear_attention"],
        rope_parameters={"rope_theta": 5e4, "rope_type": "default"},
        full_attn_alpha_factor=1.3,
        full_attn_beta_factor=0.7,
        linear_attn_alpha_factor=0.9,
        linear_attn_beta_factor=1.2,
        mlp_alpha_factor=1.1,
        mlp_beta_factor=0.8,
        **OPTIONS,
    )
    model = minimax.MiniMaxForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + drawn / 10 if parameter.dim() == 1 else drawn * 0.2)
    return model.eval()


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    logits: Tensor = model(TOKENS[None], use_cache=False).logits[0]
    return logits


@torch.no_grad()
def our_logits(model: HybridModel) -> Tensor:
    batch = pack_batch([[len(TOKENS)]], dp_rank=0, num_ranks=1, order="contiguous")
    logits: Tensor = model.eval()(TOKENS, batch).logits
    return logits


def check_logits(folder: Path, theirs: Tensor) -> None:
    """Theirs differ from ours in float64 as ours in float32 do: by float32's rounding."""
    exact = our_logits(HybridModel.from_pretrained(folder, dtype=torch.float64))
    ours = our_logits(HybridModel.from_pretrained(folder))
    assert relative_error(ours, exact) < 2e-6
    assert relative_error(theirs, exact) < 2e-6


def test_a_file_that_transformers_wrote(tmp_path: Path) -> None:
    model = their_model()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40kB")
    assert (tmp_path / "theirs" / INDEX).exists()
    check_logits(tmp_path / "theirs", their_logits(model))
    plain, back = Options("plain"), Options("hf")
    convert(plan(open_source(tmp_path / "theirs"), plain), tmp_path / "plain", plain)
    convert(plan(open_source(tmp_path / "plain"), back), tmp_path / "back", back)
    theirs, ours = read_files(tmp_path / "theirs"), read_files(tmp_path / "back")
    weights = {n: t for n, t in theirs.items() if n.rpartition(".")[2] not in DECAY}
    assert len(weights) < len(theirs)
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in weights.items())


def test_a_file_that_is_written_here(tmp_path: Path) -> None:
    config, name = MODELS["minimax-native"]
    ours = HybridModel(replace(config, num_decay_layers=None))
    ours.reset_parameters(0)
    ours.save_pretrained(tmp_path / "ours", format=name, shard_bytes=40_000)
    model, info = minimax.MiniMaxForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype=torch.float32, **OPTIONS
    )
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert {key.rpartition(".")[2] for key in info["missing_keys"]} <= set(DECAY)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    for field in ("layer_types", "mlp_beta_factor", "linear_attn_alpha_factor", "head_dim"):
        assert getattr(model.config, field) == written[field]
    check_logits(tmp_path / "ours", their_logits(model.eval()))
