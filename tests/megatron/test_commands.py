"""The documented command lines give our layers through Megatron's own parser and model builders."""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import megatron.core
import pytest
import torch

from lasp.megatron.version import VERSION
from tests.megatron.commands import Command, documented_commands
from tests.megatron.cpu import initialize
from tests.megatron.upstream.checkout import allow_python_311, stand_in_for_gpus
from tests.megatron.upstream.pretrain import logged_losses
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.megatron

TRAINING = Path(megatron.core.__file__).parents[1] / "training" / "argument_utils.py"
COMMANDS = documented_commands()
LAYERS = {"LightningSelfAttention": 7, "RingSelfAttention": 1, "ExpertParallelMoELayer": 8}


def test_hybrid_model_comes_first() -> None:
    assert [command.script for command in COMMANDS] == ["pretrain_hybrid.py", "pretrain_gpt.py"]


def test_losses_are_those_of_their_steps() -> None:
    losses = {11: 4.0, 12: 3.0, 13: 1.5}
    logged = losses | {12: 3.5}  # the mean of the first two
    line = " iteration {:8}/      20 | consumed samples: 22 | lm loss: {:.6E} | loss scale: 1.0 |\n"
    text = "".join(line.format(*step) for step in logged.items())
    assert logged_losses("saving at iteration 11 to /tmp\n" + text) == losses
    assert logged_losses("") == {}


@pytest.mark.skipif(
    VERSION < (0, 19) or not TRAINING.exists(),
    reason="needs megatron.training of 0.19 or later: unpack the wheel of megatron-core 0.19, or"
    " check out Megatron-LM, and put it on PYTHONPATH",
)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_builds_our_layers(command: Command) -> None:
    for model, layers, sizes in run_on_ranks(build, 2, command, timeout_s=300):
        assert sizes == {"context_parallel_size": 2, "expert_model_parallel_size": 2}
        assert layers == LAYERS
        assert model == {"pretrain_hybrid": "HybridModel", "pretrain_gpt": "GPTModel"}[command.name]


def build(command: Command) -> tuple[str, dict[str, int], dict[str, int]]:
    """The class of this rank's model, how many of our parts it has, and how it is split."""
    stand_in_for_gpus()
    allow_python_311()
    groups = initialize(cp=2, ep=2)
    arguments = importlib.import_module("megatron.training.arguments")
    utils = importlib.import_module("megatron.training.argument_utils")
    names = {"RANK": torch.distributed.get_rank(), "WORLD_SIZE": torch.distributed.get_world_size()}
    environment = {**command.environment, **{name: str(value) for name, value in names.items()}}
    argv = [command.script, *command.arguments, "--use-cpu-initialization"]
    kind = {"pretrain_hybrid": "hybrid", "pretrain_gpt": "gpt"}[command.name]
    with mock.patch.object(sys, "argv", argv), mock.patch.dict(os.environ, environment):
        args = arguments.parse_and_validate_args()  # kept in this process, where layers see them
    try:
        config = getattr(utils, f"{kind}_config_from_args")(args)
        config.finalize()
        module, _, builder = config.builder.rpartition(".")
        model = getattr(importlib.import_module(module), builder)(config).build_model(groups)
    finally:
        importlib.import_module("megatron.training.global_vars").unset_global_variables()
    found = Counter(type(part).__name__ for part in model.modules())
    sizes = ("context_parallel_size", "expert_model_parallel_size")
    return (
        type(model).__name__,
        {name: found[name] for name in LAYERS},
        {size: getattr(args, size) for size in sizes},
    )
