"""Models that users adapt before they train: layers in wrappers, parameters computed from others.

The wrappers of torch rename modules and parameters, and a parametrization (of LoRA, say) replaces a
parameter. Each adapted model trains over ranks as it does on one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from lasp.hybrid import HybridModel, next_token_loss, pack_batch, reduce_gradients
from moe_parallel import ExpertTopology, apply_ddp, apply_fsdp, distribute_experts
from tests.closeness import assert_equal_to_rounding
from tests.ranks import run_on_ranks
from tests.test_hybrid import groups_of
from tests.test_training import CONFIG, DOCUMENTS, VOCAB


class Scale(nn.Module):
    """One trained factor for each expert of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(weight.new_ones(weight.shape[0], 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def checkpointed_layers(model: HybridModel) -> nn.Module:
    model.layers = nn.ModuleList(checkpoint_wrapper(layer) for layer in model.layers)
    return model


def compiled_layers(model: HybridModel) -> nn.Module:
    model.layers = nn.ModuleList(torch.compile(layer, backend="eager") for layer in model.layers)
    return model


class Adapter(nn.Module):
    """A frozen projection and a trained one of rank 2 beside it."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, frozen.out_features, bias=False, dtype=torch.float64)
        nn.init.constant_(self.down.weight, 0.1)
        nn.init.constant_(self.up.weight, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def adapters_at_projections(model: HybridModel) -> nn.Module:
    model.requires_grad_(False)
    for layer in model.decoder_layers():
        for name, projection in list(layer.attention.named_children()):
            if isinstance(projection, nn.Linear):
                setattr(layer.attention, name, Adapter(projection))
    return model


def scaled_experts(model: HybridModel) -> nn.Module:
    for layer in model.decoder_layers():
        experts = layer.moe.experts
        parametrize.register_parametrization(experts, "w2", Scale(experts.w2))
    return model


def experts_of_both_layers(model: HybridModel) -> nn.Module:
    first, second = (layer.moe.experts for layer in model.decoder_layers())
    second.w13, second.w2 = first.w13, first.w2
    return model


ADAPTATIONS: dict[str, Callable[[HybridModel], nn.Module]] = {
    "checkpoint_wrapper around layers": checkpointed_layers,
    "checkpoint_wrapper around the model": checkpoint_wrapper,
    "compiled layers": compiled_layers,
    "adapters at projections": adapters_at_projections,
    "parametrized experts": scaled_experts,
    "experts of both layers": experts_of_both_layers,
}


def adapted_on_rank(sizes: dict[str, int], adaptation: str, how: str) -> dict[str, Tensor]:
    """Gradients of a step: those of some dense parameters, and all of experts over ranks."""
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    groups = groups_of(topology)
    model = HybridModel(CONFIG, groups=groups, dtype=torch.float64)
    model.reset_parameters(0)
    call = ADAPTATIONS[adaptation](model)
    if how == "ddp":
        call = apply_ddp(call, groups)
    elif how == "dtensors":
        distribute_experts(model, topology)
    elif how == "fsdp":
        apply_fsdp(model, topology, blocks=model.layers)
    replicas = [part.tolist() for part in torch.tensor(DOCUMENTS).chunk(topology.dp)]
    at = topology.dense_coordinates(dist.get_rank())
    batch = pack_batch(replicas, dp_rank=at.dp, num_ranks=1, order="contiguous")
    pack = torch.arange(sum(DOCUMENTS)) * 7 % VOCAB
    mine = pack.split([sum(part) for part in replicas])[at.dp]
    output = call(mine, batch)
    (next_token_loss(output.logits, (mine + 3) % VOCAB, len(pack)) + output.aux_loss).backward()
    if how in ("plain", "dtensors"):
        reduce_gradients(model)
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert (grad is None) is not parameter.requires_grad, name
        if grad is None:
            continue
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        elif ".experts." in name and groups.ep is not None:
            parts = [torch.empty_like(grad) for _ in range(groups.ep.size())]
            dist.all_gather(parts, grad, group=groups.ep)
            grad = torch.cat(parts)
        found[name] = grad
    return found


@pytest.mark.parametrize(
    ("adaptation", "hows"),
    [
        ("checkpoint_wrapper around layers", ["plain", "ddp", "fsdp"]),
        ("checkpoint_wrapper around the model", ["ddp"]),
        ("compiled layers", ["plain", "ddp"]),
        ("adapters at projections", ["plain", "ddp", "fsdp"]),
        ("parametrized experts", ["plain", "ddp"]),
        ("experts of both layers", ["plain", "dtensors", "ddp"]),
    ],
)
def test_adapted_models_train_as_on_one_rank(adaptation: str, hows: list[str]) -> None:
    (expected,) = run_on_ranks(adapted_on_rank, 1, {}, adaptation, "plain")
    for how in hows:
        for rank, actual in enumerate(run_on_ranks(adapted_on_rank, 2, {"ep": 2}, adaptation, how)):
            assert actual.keys() == expected.keys()
            for name, grad in expected.items():
                what = f"gradient of {name}, {how} on rank {rank}"
                assert_equal_to_rounding(actual[name], grad, what=what)


def unfrozen(model: HybridModel) -> None:
    model.head.weight.requires_grad_(True)


def unfrozen_experts(model: HybridModel) -> None:
    model.layers[1].moe.experts.w2.requires_grad_(True)


def replaced(model: HybridModel) -> None:
    gate = model.layers[0].moe.gate
    gate.weight = nn.Parameter(gate.weight.detach().clone())


def converted(model: HybridModel) -> None:
    model.layers[0].moe.experts.double()


def adapted_late(model: HybridModel) -> None:
    attention = model.layers[0].attention
    attention.out_proj = Adapter(attention.out_proj)


def unchanged_where_it_trains(model: HybridModel) -> None:
    model.layers[1].attention.requires_grad_(False)
    model.embedding = nn.Embedding.from_pretrained(model.embedding.weight.detach())


CHANGES: dict[str, tuple[Callable[[HybridModel], None], list[str]]] = {
    "unfrozen": (unfrozen, ["head.weight"]),
    "unfrozen experts": (unfrozen_experts, ["layers.1.moe.experts.w2"]),
    "replaced": (replaced, ["layers.0.moe.gate.weight"]),
    "converted": (converted, ["layers.0.moe.experts.w13", "layers.0.moe.experts.w2"]),
    "adapted": (
        adapted_late,
        [f"layers.0.attention.out_proj.{name}.weight" for name in ("down", "up")],
    ),
}


def changed_under_ddp_on_rank() -> None:
    topology = ExpertTopology(2, ep=2)
    groups = groups_of(topology)
    batch = pack_batch([[4], [4]], dp_rank=dist.get_rank(), num_ranks=1, order="contiguous")

    def wrapped() -> tuple[HybridModel, nn.Module]:
        model = HybridModel(CONFIG, groups=groups)
        model.head.weight.requires_grad_(False)
        model.layers[1].moe.experts.w2.requires_grad_(False)
        ddp = apply_ddp(model, groups, find_unused_parameters=True)
        ddp(torch.arange(4), batch).logits.sum().backward()
        return model, ddp

    for change, names in CHANGES.values():
        model, ddp = wrapped()
        change(model)
        with pytest.raises(ValueError) as error:
            ddp(torch.arange(4), batch)
        assert f"got {names}" in str(error.value)
        assert "before apply_ddp" in str(error.value)
    model, ddp = wrapped()
    unchanged_where_it_trains(model)
    ddp(torch.arange(4), batch).logits.sum().backward()


def test_parameters_that_change_under_apply_ddp_are_refused() -> None:
    run_on_ranks(changed_under_ddp_on_rank, 2)


def averaged_on_rank(sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Logits of a model over ranks and of its moving average of one."""
    topology = ExpertTopology(dist.get_world_size(), **sizes)
    model = HybridModel(CONFIG, groups=groups_of(topology))
    model.reset_parameters(0)
    average = AveragedModel(model)
    average.update_parameters(model)
    batch = pack_batch([[4], [4]], dp_rank=dist.get_rank(), num_ranks=1, order="contiguous")
    return model(torch.arange(4), batch).logits, average(torch.arange(4), batch).logits


def test_a_copy_works_over_the_same_ranks() -> None:
    for logits, of_copy in run_on_ranks(averaged_on_rank, 2, {"ep": 2}):
        assert torch.equal(logits, of_copy)
