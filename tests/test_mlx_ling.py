"""The hybrid decoder is mlx-lm's Ling-2.5 and Ring-linear-2.0: oracles that others wrote.

They compute in float32 on the CPU, one document at a time.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lasp.hybrid import (
    AttentionConfig,
    DenseConfig,
    HybridConfig,
    HybridModel,
    LatentConfig,
    Residuals,
    RopeScaling,
    pack_batch,
)
from lasp.layers.options import LightningOptions
from moe_parallel import MoEConfig, RouterConfig
from tests.checkpoints.files import read_files
from tests.closeness import relative_error

REASON = "needs mlx-lm: pip install --group oracles"
mx = pytest.importorskip("mlx.core", reason=REASON)
ling = pytest.importorskip("mlx_lm.models.bailing_hybrid", reason=REASON)
ring = pytest.importorskip("mlx_lm.models.bailing_moe_linear", reason=REASON)

HIDDEN, HEADS, DIM, VOCAB = 32, 4, 8, 40
LING = HybridConfig(
    num_layers=7,
    vocab_size=VOCAB,
    attention=AttentionConfig(
        HEADS, HEADS, DIM, 4, 600.0, latent=LatentConfig(12, 6, 4, 10, 16, rope_interleaved=True)
    ),
    moe=MoEConfig(
        HIDDEN,
        12,
        num_experts=16,
        top_k=4,
        router=RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=4, top_groups=2),
        shared_ffn_size=10,
    ),
    dense=DenseConfig(HIDDEN, 20, 1),
    pattern="GG*GG**",  # groups of three; a layer that fills no group is softmax
    lightning=LightningOptions("none", True, 4, 600.0, None, norm_groups=2),
    residuals=Residuals(),
    norm_eps=1e-6,
    decay="alibi",  # mlx-lm 0.32 subtracts nothing from the layer
)
SCALING = RopeScaling("yarn", 4.0, 32, mscale=1.0, mscale_all_dim=0.7)
LONGER = replace(
    LING,
    attention=replace(LING.attention, rope_scaling=SCALING),
    lightning=replace(LING.lightning, rope_scaling=SCALING),
)
RING = replace(
    LING,
    attention=AttentionConfig(HEADS, 2, DIM, 4, 600.0, qk_norm=True),
    decay="bailing_clamped",  # mlx-lm 0.32 subtracts 1, but not from layer 0
)


def theirs(model: HybridModel, folder: Path) -> Any:
    """mlx-lm's model of the files of ours, by their config.json and their tensors."""
    ours = copy.deepcopy(model).float()
    ours.config = replace(model.config, decay="bailing")  # no file says which formula it is
    ours.save_pretrained(folder, format="bailing")
    module = ring if model.config.attention.latent is None else ling
    fields = json.loads((folder / "config.json").read_text())
    oracle = module.Model(module.ModelArgs.from_dict(fields))
    weights = {name: mx.array(value.numpy()) for name, value in read_files(folder).items()}
    oracle.load_weights(list(oracle.sanitize(weights).items()))
    return oracle


@pytest.mark.parametrize(
    "config", [LING, LONGER, RING], ids=["Ling-2.5", "Ling-2.5 by YaRN", "Ring-linear-2.0"]
)
def test_logits_are_those_of_mlx(config: HybridConfig, tmp_path: Path) -> None:
    model = HybridModel(config, dtype=torch.float64)
    model.reset_parameters(0)
    for name, value in model.state_dict().items():
        if "norm" in name:
            value.normal_(1.0, 0.2)
        if name.endswith("expert_bias"):
            value.uniform_(0.0, 0.2)
    oracle = theirs(model, tmp_path / "files")
    tokens, lengths = torch.randint(VOCAB, (50,)), (30, 1, 19)
    with mx.stream(mx.cpu):
        expected = torch.cat(
            [
                torch.tensor(oracle(mx.array(document[None].numpy()))[0].tolist())
                for document in tokens.split(lengths)
            ]
        )
    batch = pack_batch([lengths], dp_rank=0, num_ranks=1, order="contiguous")
    with torch.no_grad():
        exact = model(tokens, batch).logits
        ours = copy.deepcopy(model).float()(tokens, batch).logits
    # Theirs differs from ours in float64 as ours in float32 does: by float32's rounding.
    assert relative_error(expected, exact) < 2e-6
    assert relative_error(ours, exact) < 2e-6
