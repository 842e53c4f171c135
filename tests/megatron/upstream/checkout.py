"""What a check is, and a checkout of Megatron-LM in a rank process."""

from __future__ import annotations

import functools
import importlib
import sys
import typing
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode


class Check(NamedTuple):
    """One test of upstream's with one of our parts.

    Attributes:
        name: printed.
        ranks: how many it takes.
        run: rank function, called with the folder for checkpoints and ``arguments``.
        arguments: of ``run``.
        skip: why it is not run, if so.
    """

    name: str
    ranks: int
    run: Callable[..., None]
    arguments: tuple[Any, ...]
    skip: str = ""


class OnCpu(TorchFunctionMode):
    """Makes tensors on the CPU that are asked for on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = torch.device("cpu")
        return function(*args, **kwargs)


def allow_python_311() -> None:
    """Megatron's training package imports what ``typing`` has from 3.12 on."""
    if sys.version_info < (3, 12):
        import typing_extensions

        typing.override = typing_extensions.override


@functools.cache
def stand_in_for_gpus() -> None:
    """Have the CPU stand in for GPUs, in this process and for good."""
    from tests.megatron.cpu import run_on_cpu

    run_on_cpu()
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.cuda.set_device = lambda *_: None
    torch.cuda.Stream = torch.cuda.current_stream = lambda *_, **__: mock.MagicMock()
    torch.cuda.stream = lambda _: nullcontext()
    torch.cuda.get_device_properties = lambda *_: mock.MagicMock(major=9)
    OnCpu().__enter__()


@functools.cache
def prepare(checkout: str, device: str) -> None:
    """Make the checkout importable in this process, and the CPU stand in for GPUs."""
    import tests

    sys.path.insert(1, checkout)  # after this repository, whose tests have the same name
    tests.__path__.append(str(Path(checkout, "tests")))
    sys.argv = sys.argv[:1]  # its parse_args reads them
    if device == "cpu":
        stand_in_for_gpus()
    allow_python_311()
    utilities = upstream("test_utilities")
    utilities.Utils.rank, utilities.Utils.world_size = dist.get_rank(), dist.get_world_size()


def upstream(name: str) -> Any:
    return importlib.import_module(f"tests.unit_tests.{name}")


def supported(config: Callable[..., Any], device: str, **values: Any) -> Callable[..., Any]:
    """TransformerConfig with other values for some options; weights made where the tensors are."""
    if device == "cpu":
        values["use_cpu_initialization"] = True
    return lambda **options: config(**(options | values))


def on_rank(
    checkout: str, device: str, folder: str, run: Callable[..., None], *arguments: Any
) -> None:
    """Rank function: one check."""
    prepare(checkout, device)
    from tests.megatron.cpu import checkpoints_from_ranks

    with checkpoints_from_ranks():
        run(folder, device, *arguments)
