"""Small random models of each family in released files, for tests of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lasp.checkpoints.configs import FormatName, config_fields
from lasp.checkpoints.mapping import mapped
from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    LatentConfig,
    Residuals,
    ResidualScale,
    VocabularyConfig,
)
from lasp.layers.options import LightningOptions
from moe_parallel import MoEConfig, RouterConfig

INDEX = "model.safetensors.index.json"
MINIMAX = HybridConfig(
    num_layers=4,
    vocab_size=40,
    attention=AttentionConfig(4, 2, 8, rotary_dim=4, rope_base=1e7),
    moe=MoEConfig(32, 12, num_experts=4, top_k=2, aux_loss_coefficient=0.001),
    pattern="3:1",
    residuals=Residuals(
        "post", ResidualScale(0.9, 1.2), ResidualScale(1.3, 0.7), ResidualScale(1.1, 0.8)
    ),
)
LING = HybridConfig(
    num_layers=7,
    vocab_size=40,
    attention=AttentionConfig(
        4, 4, 8, 4, 600.0, latent=LatentConfig(12, 6, 4, 10, 16, rope_interleaved=True)
    ),
    moe=MoEConfig(
        32,
        12,
        num_experts=8,
        top_k=4,
        router=RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=4, top_groups=2),
        shared_ffn_size=10,
    ),
    dense=DenseConfig(32, 20, 1),
    pattern="GG*GG**",
    lightning=LightningOptions("none", True, 4, 600.0, None, norm_groups=2),
    residuals=Residuals(),
    norm_eps=1e-6,
    decay="bailing",
)
LING_MTP = replace(LING, mtp_loss_weight=0.3)
RING = replace(LING, attention=AttentionConfig(4, 2, 8, 4, 600.0, qk_norm=True))
_SCALED = ResidualScale(beta=1.4 / 4**0.5)
SALA = HybridConfig(
    num_layers=4,
    vocab_size=40,
    attention=AttentionConfig(4, 2, 8, 0, gated=True, dense_len=64),
    moe=None,
    dense=DenseConfig(32, 20),
    pattern="*GG*",
    lightning=LightningOptions("none", True, 8, 10_000.0, None),
    vocabulary=VocabularyConfig(embedding_scale=12.0, logit_scale=0.25),
    residuals=Residuals("pre", _SCALED, _SCALED, _SCALED),
    norm_eps=1e-6,
    decay="sala",
)
MODELS: dict[str, tuple[HybridConfig, FormatName]] = {
    "minimax": (MINIMAX, "minimax"),
    "minimax-native": (
        replace(MINIMAX, attention=AttentionConfig(4, 2, 8, rotary_dim=8, rope_base=1e7)),
        "minimax-native",
    ),
    "ling": (LING, "bailing"),
    "ling-mtp": (LING_MTP, "bailing"),
    "ring": (RING, "bailing"),
    "sala": (SALA, "sala"),
}


def random_tensors(config: HybridConfig, name: FormatName) -> dict[str, Tensor]:
    """bfloat16 of every tensor; biases of experts are float32 in files too."""
    file_format, _ = config_fields(config, name)
    generator = torch.Generator().manual_seed(0)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(
            torch.float32 if tensor.name.endswith("expert_bias") else torch.bfloat16
        )
        for tensor in mapped(file_format.family, config)
    }


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], num_shards: int = 2
) -> None:
    """Released files, without our writer."""
    folder.mkdir()
    weight_map = {}
    for index in range(num_shards):
        shard = f"model-{index + 1:05}-of-{num_shards:05}.safetensors"
        held = dict(list(tensors.items())[index::num_shards])
        save_file(held, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")


def write_model(folder: Path, model: str = "minimax") -> dict[str, Tensor]:
    """A model of ``MODELS``; returns its tensors."""
    config, name = MODELS[model]
    tensors = random_tensors(config, name)
    _, fields = config_fields(config, name)
    write_files(folder, tensors, fields)
    return tensors


def read_files(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every shard."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name
