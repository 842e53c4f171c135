"""A model from files and into them, whole and cut over ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.checkpoints import read_config
from lasp.checkpoints.safetensors_folder import SafetensorsFolder
from lasp.hybrid import HybridModel, VocabularyConfig, pack_batch
from moe_parallel import ExpertTopology, distribute_experts
from tests.checkpoints.files import MODELS, assert_same, read_files, write_model
from tests.ranks import refusal, run_on_ranks
from tests.test_hybrid import groups_of


def state(model: HybridModel) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if "tokens_per_expert" not in n}


@pytest.mark.parametrize("model", MODELS)
def test_whole(model: str, tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in", model)
    config, name = MODELS[model]
    loaded = HybridModel.from_pretrained(tmp_path / "in")
    assert loaded.config == read_config(tmp_path / "in")
    assert loaded.config.attention == config.attention
    loaded.save_pretrained(tmp_path / "out", shard_bytes=20_000, format=name)
    assert_same(read_files(tmp_path / "out"), tensors)
    loaded.save_pretrained(tmp_path / "like", like=tmp_path / "in")
    assert (tmp_path / "like" / "tokenizer.json").exists()
    again = HybridModel.from_pretrained(tmp_path / "like", dtype=torch.float64)
    assert again.embedding.weight.dtype == torch.float64
    expected = HybridModel(config, dtype=torch.float64)
    expected.load_state_dict(loaded.state_dict())
    assert_same(state(again), state(expected))
    batch = pack_batch([[5, 2]], dp_rank=0, num_ranks=1, order="contiguous")
    logits = [m(torch.arange(7), batch).logits for m in (again.eval(), expected.eval())]
    assert torch.equal(*logits)


def test_other_options_of_training(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    config = read_config(tmp_path / "in")
    options = replace(config.moe, capacity_factor=1.5)
    head = VocabularyConfig(float32_head=True)
    config = replace(config, moe=options, vocabulary=head, exchange="scan")
    model = HybridModel.from_pretrained(tmp_path / "in", config=config)
    assert model.config is config
    assert model.head.weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "out")
    assert read_files(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "wide", float32_routers=True)
    assert read_files(tmp_path / "wide")["lm_head.weight"].dtype == torch.float32


def load_and_save(folder: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """On a rank: its parameters and what it read of experts."""
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    read, asked = SafetensorsFolder.read, []

    def recorded(self: Any, name: str, expert: Any, cut: Any = None) -> Tensor:
        tensor = read(self, name, expert, cut)
        asked.append((name, tuple(tensor.shape)))
        return tensor

    with mock.patch.object(SafetensorsFolder, "read", recorded):
        model = HybridModel.from_pretrained(folder / "in", groups=groups_of(topology))
    values = {n: p.detach() for n, p in model.named_parameters()}
    model.save_pretrained(folder / "out", shard_bytes=10_000)
    if max(topology.ep, topology.etp) > 1:
        distribute_experts(model, topology)
    model.save_pretrained(folder / "distributed", like=folder / "in")
    return {"values": values, "asked": asked, "at": topology.expert_coordinates(dist.get_rank())}


@pytest.mark.parametrize(
    ("model", "num_ranks", "sizes"),
    [
        ("minimax", 4, {"ep": 2, "etp": 2, "cp": 2}),
        pytest.param("ring", 2, {"ep": 2}, marks=pytest.mark.slow),
        pytest.param("minimax", 4, {"ep": 2}, marks=pytest.mark.slow),
        pytest.param("sala", 2, {}, marks=pytest.mark.slow),
    ],
)
def test_over_ranks(model: str, num_ranks: int, sizes: dict[str, int], tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "in", model)
    whole = HybridModel.from_pretrained(tmp_path / "in")
    topology = ExpertTopology(num_ranks, **sizes)
    for result in run_on_ranks(load_and_save, num_ranks, tmp_path, sizes):
        at = result["at"]
        for name, parameter in whole.named_parameters():
            if ".moe.experts." in name:
                parameter = parameter.chunk(topology.ep)[at.ep]
                parameter = parameter.chunk(topology.etp, 2)[at.etp]
            assert torch.equal(result["values"][name], parameter), name
        experts = [(n, shape) for n, shape in result["asked"] if ".experts." in n]
        held = sum(n.count(".experts.") for n in tensors)
        assert len(experts) == held // topology.ep
        for name, shape in experts:
            assert torch.Size(shape).numel() == tensors[name].numel() // topology.etp
    for out in ("out", "distributed"):
        assert_same(read_files(tmp_path / out), tensors)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"in", "out", "distributed"}


def save_into_what_is_there(folder: Path) -> None:
    topology = ExpertTopology(2, ep=2)
    model = HybridModel.from_pretrained(folder / "in", groups=groups_of(topology))
    model.save_pretrained(folder / "in")


def save_where_one_rank_fails(folder: Path) -> None:
    topology = ExpertTopology(2, ep=2)
    model = HybridModel.from_pretrained(folder / "in", groups=groups_of(topology))
    if dist.get_rank() == 1:
        failing = mock.patch(
            "lasp.checkpoints.model_files.write_shards", side_effect=OSError("disk full")
        )
        with failing, pytest.raises(OSError, match="disk full"):
            model.save_pretrained(folder / "out")
        raise ValueError("as it should")
    model.save_pretrained(folder / "out")


def test_errors_reach_every_rank(tmp_path: Path) -> None:
    write_model(tmp_path / "in")
    for message in run_on_ranks(refusal, 2, save_into_what_is_there, tmp_path):
        assert "the folder to write must not be there yet" in message
    first, second = run_on_ranks(refusal, 2, save_where_one_rank_fails, tmp_path)
    assert "rank 1 must write its part, got the error: disk full" in first
    assert "as it should" in second
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
