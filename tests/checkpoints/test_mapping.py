"""Every parameter of a model has one tensor in a format, and every tensor of it one parameter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from lasp import RopeScaling
from lasp.checkpoints.atoms import Atom, atoms_of
from lasp.checkpoints.configs import FORMATS, config_fields
from lasp.checkpoints.families import BAILING, MEGATRON_GPT, MEGATRON_HYBRID, MINIMAX, PLAIN, SALA
from lasp.checkpoints.family import Family
from lasp.checkpoints.mapping import mapped
from lasp.hybrid import NAMED_CONFIGS, HybridConfig, HybridModel, VocabularyConfig
from lasp.layers.options import LightningOptions
from tests.checkpoints.files import LING, LING_MTP, MODELS
from tests.checkpoints.files import MINIMAX as MINIMAX_SMALL
from tests.checkpoints.files import SALA as SMALL_SALA

YARN = RopeScaling("yarn", 4.0, 32_768, mscale_all_dim=0.7)
SHAPES = ("minimax-text-01", "ring-flash-linear-2.0", "ling-2.5-1t", "minicpm-sala")
CONFIGS = {name: NAMED_CONFIGS[name] for name in SHAPES}
CONFIGS |= {name: config for name, (config, _) in MODELS.items()}
CONFIGS["ling-yarn"] = replace(
    LING,
    attention=replace(LING.attention, rope_scaling=YARN),
    lightning=replace(LING.lightning, rope_scaling=YARN),
)


# Up to 60,000 names; a smaller model of the same family is in every run.
LARGE = ("ling-2.5-1t", "ring-flash-linear-2.0")


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[pytest.mark.slow] if name in LARGE else [])
        for name, config in CONFIGS.items()
    ],
)
def test_every_parameter_has_one_source(config: HybridConfig) -> None:
    """On the meta device: shapes of the model are those of the table, atom by atom."""
    model = HybridModel(config, device="meta")
    names = {n: tuple(p.shape) for n, p in model.named_parameters()}
    names |= {n: tuple(b.shape) for n, b in model.named_buffers() if n.endswith("expert_bias")}
    plain, atoms = mapped(PLAIN, config), atoms_of(config)
    assert {tensor.name: tensor.shape for tensor in plain} == names
    assert sum(torch.Size(shape).numel() for shape in atoms.values()) == sum(
        torch.Size(shape).numel() for shape in names.values()
    )
    families = {PLAIN: plain}
    others = [config_fields(config)[0].family]
    if config.mtp_loss_weight is None:
        others += [MEGATRON_GPT, MEGATRON_HYBRID]
    families |= {family: mapped(family, config) for family in others}
    for family, tensors in families.items():
        assert Counter(atom for tensor in tensors for atom in tensor.atoms) == Counter(list(atoms))
        places = Counter((tensor.name, tensor.expert) for tensor in tensors)
        assert set(places.values()) == {1}
        assert not any(family.skips(tensor.name) for tensor in tensors)


def test_parameters_of_options_that_no_format_has() -> None:
    options = LightningOptions(qkv_bias=True, gate_bias=True, out_bias=True)
    moe = replace(MINIMAX_SMALL.moe, shared_ffn_size=6, shared_gate=True)
    config = replace(
        MINIMAX_SMALL, lightning=options, moe=moe, vocabulary=VocabularyConfig(tied=True)
    )
    names = {n: tuple(p.shape) for n, p in HybridModel(config, device="meta").named_parameters()}
    assert {tensor.name: tensor.shape for tensor in mapped(PLAIN, config)} == names
    with pytest.raises(ValueError, match="must be of a model that a format has: minimax: "):
        config_fields(config)


def test_counts_of_released_files() -> None:
    """MiniMax-VL-01's index has 8,637 names, of which 394 are of its vision tower and projector."""
    assert len(mapped(MINIMAX, NAMED_CONFIGS["minimax-text-01"])) == 8_637 - 394


@pytest.mark.parametrize(
    ("family", "config", "atom"),
    [
        (MINIMAX, LING, "lightning.q_norm of layer 0"),
        (BAILING, SMALL_SALA, "softmax.gate of layer 0"),
        (SALA, LING, "router of layer 1"),
        (MEGATRON_GPT, LING_MTP, "mtp.token_norm of layer 7"),
    ],
)
def test_models_that_a_format_has_no_names_for(
    family: Family, config: HybridConfig, atom: str
) -> None:
    with pytest.raises(ValueError, match=f"format {family.name} has names for, got .* {atom}"):
        mapped(family, config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_configs_say_the_same_there_and_back(config: HybridConfig) -> None:
    file_format, fields = config_fields(config)
    read = file_format.read(fields)
    assert config_fields(read, file_format.name)[1] == fields
    assert read.kinds == config.kinds
    assert read.attention == config.attention
    for name in FORMATS.keys() - {file_format.name}:
        try:
            other, fields = config_fields(config, name)
        except ValueError:
            continue
        assert {name, file_format.name} == {"minimax", "minimax-native"}
        assert other.read(fields).attention == config.attention


@pytest.mark.parametrize(
    ("model", "family", "experts"),
    [
        ("minimax", MINIMAX, "model.layers.1.block_sparse_moe.experts.2.{}.weight"),
        ("ring", BAILING, "model.layers.1.mlp.experts.2.{}.weight"),
    ],
)
def test_who_is_activated_among_the_experts(model: str, family: Family, experts: str) -> None:
    """The gate is what SwiGLU activates: released code calls it w1, or gate_proj."""
    found = {tensor.name: tensor.atoms for tensor in mapped(family, MODELS[model][0])}
    names = ("w1", "w3", "w2") if model == "minimax" else ("gate_proj", "up_proj", "down_proj")
    roles = [found[experts.format(name)] for name in names]
    assert roles == [(Atom(f"experts.{role}", 1, 2),) for role in ("gate", "up", "down")]
