"""torch's own tools around the hybrid decoder: what trains on one rank trains alike under them.

DDP, FSDP2, ``torch.distributed.checkpoint`` and clipping, over experts that are split, against one
rank that holds everything.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from lasp.hybrid import (
    AttentionConfig,
    HybridConfig,
    HybridModel,
    VocabularyConfig,
    next_in_document,
    next_token_loss,
    pack_batch,
    reduce_gradients,
)
from moe_parallel import (
    ExpertTopology,
    MoEConfig,
    apply_ddp,
    apply_fsdp,
    clip_grad_norm_,
    distribute_experts,
    parameter_groups,
    update_expert_bias,
)
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.test_hybrid import groups_of

VOCAB, DOCUMENTS = 16, (5, 7, 6, 6)
CONFIG = HybridConfig(
    num_layers=2,
    vocab_size=VOCAB,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8, rotary_dim=8),
    moe=MoEConfig(16, 8, 4, 2, aux_loss_coefficient=0.1),
    pattern="1:1",
)


class Job:
    """A model under one of the tools on this rank, and its optimizer.

    ``how``: ``plain``, gradients summed by ``reduce_gradients``; ``ddp``; ``fsdp``. With
    ``+dtensors`` the experts are DTensors before the wrapper comes, with ``+recompute`` the layers
    run again in the backward.
    """

    def __init__(
        self,
        topology: ExpertTopology,
        how: str,
        seed: int,
        device: str,
        config: HybridConfig = CONFIG,
    ) -> None:
        self.how, self.topology, self.groups = how, topology, groups_of(topology)
        self.config = config
        self.device = f"cuda:{dist.get_rank()}" if device == "cuda" else device
        model = HybridModel(config, groups=self.groups, device=self.device, dtype=torch.float64)
        model.reset_parameters(seed)
        if "+recompute" in how:
            for layer in model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if "+dtensors" in how:
            distribute_experts(model, topology)
        self.model, self.call = model, model
        if "ddp" in how:
            self.call = apply_ddp(model, self.groups)
        elif "fsdp" in how:
            apply_fsdp(model, topology, blocks=model.layers)
        # As by default on GPUs: the parameters of a group together.
        self.optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2, foreach=True)

    def step(self, number: int, micro_batches: int = 1) -> Tensor:
        """One step of training on all documents; the norm of the gradients."""
        at = self.topology.dense_coordinates(dist.get_rank())
        replicas = torch.tensor(DOCUMENTS).chunk(self.topology.dp)
        lengths = [part.tolist() for part in replicas]
        batch = pack_batch(lengths, dp_rank=at.dp, num_ranks=1, order="contiguous")
        for micro_batch in range(micro_batches):
            pack = (torch.arange(sum(DOCUMENTS)) * 7 + number + micro_batch) % VOCAB
            mine = pack.split([sum(part) for part in lengths])[at.dp].to(self.device)
            more = {}
            if self.config.mtp_loss_weight is not None:
                more["next_tokens"] = next_in_document(mine, batch.layout, pad_value=0)
            output = self.call(mine, batch, **more)
            loss = next_token_loss(output.logits, (mine + 3) % VOCAB, len(pack)) + output.aux_loss
            if output.mtp_logits is not None:
                loss = loss + next_token_loss(output.mtp_logits, (mine + 5) % VOCAB, len(pack))
            loss.backward()
        if "plain" in self.how:
            reduce_gradients(self.model)
        norm = clip_grad_norm_(self.model, 1.0, self.groups)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.config.moe is not None and self.config.moe.router.expert_bias:
            update_expert_bias(self.model)
        return norm

    def state(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def whole(self) -> dict[str, Tensor]:
        """Every parameter, whole, on the host."""
        if "dtensors" not in self.how and "fsdp" not in self.how:
            distribute_experts(self.model, self.topology)
        found = {}
        for name, parameter in self.model.named_parameters():
            whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name] = whole.detach().cpu()
        return found


def trained_on_rank(
    sizes: dict[str, int], hows: list[str], device: str, config: HybridConfig = CONFIG
) -> list[dict[str, Tensor]]:
    """Parameters after two steps, of which the second accumulates, and both norms."""
    results = []
    for how in hows:
        job = Job(ExpertTopology(dist.get_world_size(), **sizes), how, 0, device, config)
        norms = torch.stack([job.step(0), job.step(1, micro_batches=2)]).cpu()
        results.append({"norms": norms, **job.whole()})
    return results


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal_to_rounding(actual[name], tensor, what=f"{name} {what}")


HOWS = ["plain+dtensors", "ddp", "ddp+dtensors+recompute", "fsdp", "fsdp+recompute"]


def check_wrappers(num_ranks: int, sizes: dict[str, int], **where: str) -> None:
    device = "cuda" if where.get("backend") == "nccl" else "cpu"
    (expected,) = run_on_ranks(trained_on_rank, 1, {}, ["plain"], device, **where)[0]
    results = run_on_ranks(trained_on_rank, num_ranks, sizes, HOWS, device, **where)
    for rank, of_rank in enumerate(results):
        for how, actual in zip(HOWS, of_rank, strict=True):
            assert_same(actual, expected, f"{how} on rank {rank}")


@pytest.mark.parametrize(
    ("num_ranks", "sizes"),
    [(2, {"ep": 2}), (2, {"etp": 2}), (4, {"ep": 2, "etp": 2}), (4, {"ep": 2}), (2, {})],
)
def test_wrapped_models_train_as_one_rank_does(num_ranks: int, sizes: dict[str, int]) -> None:
    check_wrappers(num_ranks, sizes)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"etp": 2}, {}])
def test_wrapped_models_train_on_two_gpus_as_on_one(sizes: dict[str, int]) -> None:
    check_wrappers(2, sizes, backend="nccl")


def saved_on_rank(
    sizes: dict[str, int], how: str, path: Path, device: str, config: HybridConfig
) -> dict[str, Tensor]:
    """Saves after two steps; the parameters after two more."""
    job = Job(ExpertTopology(dist.get_world_size(), **sizes), how, 0, device, config)
    for number in range(4):
        if number == 2:
            dcp.save(job.state(), checkpoint_id=path)
        job.step(number)
    return job.whole()


def resumed_on_rank(
    sizes: dict[str, int], how: str, path: Path, device: str, config: HybridConfig
) -> dict[str, Tensor]:
    job = Job(ExpertTopology(dist.get_world_size(), **sizes), how, 1, device, config)
    state = job.state()
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(job.model, state["model"])
    set_optimizer_state_dict(job.model, job.optimizer, state["optimizer"])
    for number in (2, 3):
        job.step(number)
    return job.whole()


Run = tuple[int, dict[str, int], str]


def check_checkpoint(
    path: Path, save: Run, loads: list[Run], config: HybridConfig = CONFIG, **where: str
) -> None:
    device = "cuda" if where.get("backend") == "nccl" else "cpu"
    num_ranks, *how = save
    to = (path, device, config)
    expected = run_on_ranks(saved_on_rank, num_ranks, *how, *to, **where)[0]
    for num_ranks, *how in loads:
        for actual in run_on_ranks(resumed_on_rank, num_ranks, *how, *to, **where):
            assert_same(actual, expected, f"read on {num_ranks} ranks, {how}")


ONE, ETP = (1, {}, "plain"), (2, {"etp": 2}, "plain+dtensors")


@pytest.mark.parametrize(
    ("save", "loads"),
    [
        ((4, {"ep": 2, "etp": 2}, "plain+dtensors"), [ONE, ETP, (4, {"ep": 4}, "fsdp")]),
        ((4, {"ep": 2}, "fsdp"), [ONE, ETP, (4, {"ep": 4}, "ddp+dtensors")]),
        ((2, {"ep": 2}, "ddp+dtensors"), [ONE, (4, {"etp": 2}, "fsdp")]),
    ],
)
def test_a_checkpoint_is_read_under_other_sizes(save: Run, loads: list[Run], tmp_path) -> None:
    check_checkpoint(tmp_path / "saved", save, loads)


@pytest.mark.multi_gpu
def test_a_checkpoint_of_two_gpus_is_read_under_other_sizes(tmp_path) -> None:
    loads = [ONE, ETP, (2, {}, "fsdp")]
    check_checkpoint(tmp_path / "saved", (2, {"ep": 2}, "fsdp"), loads, backend="nccl")


def mixed_on_rank(float32_head: bool) -> dict[str, torch.dtype]:
    topology = ExpertTopology(2, ep=2)
    chosen = replace(CONFIG, vocabulary=VocabularyConfig(float32_head=float32_head))
    model = HybridModel(chosen, groups=groups_of(topology))
    model.reset_parameters(0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    apply_fsdp(model, topology, blocks=model.layers, mp_policy=policy)
    seen = {}

    def see(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen[name] = {p.dtype for p in module.parameters(recurse=False)}.pop()

    for name in ("layers.0.moe.gate", "layers.0.moe.experts", "head"):
        model.get_submodule(name).register_forward_pre_hook(partial(see, name))
    batch = pack_batch([[4], [4]], dp_rank=dist.get_rank(), num_ranks=1, order="contiguous")
    output = model(torch.arange(4), batch)
    (output.logits.float().sum() + output.aux_loss).backward()
    return seen | {"logits": output.logits.dtype}


@pytest.mark.parametrize("float32_head", [False, True])
def test_fsdp_in_mixed_precision_keeps_the_dtype_of_router_and_head(float32_head: bool) -> None:
    of_head = torch.float32 if float32_head else torch.bfloat16
    for seen in run_on_ranks(mixed_on_rank, 2, float32_head):
        assert seen == {
            "layers.0.moe.gate": torch.float32,
            "layers.0.moe.experts": torch.bfloat16,
            "head": of_head,
            "logits": of_head,
        }
