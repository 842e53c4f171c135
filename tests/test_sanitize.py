"""What compute-sanitizer watches is every kernel there is."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from lasp.lightning.triton.device import is_hopper
from tests import sanitize


def kernels() -> dict[str, Any]:
    """By name: what is launched ends in ``_kernel``. Those in Gluon run on Hopper alone."""
    in_gluon = is_hopper(torch.device(sanitize.DEVICE))
    found = {}
    for package in (
        "lasp.lightning.triton",
        "lasp.layers.triton",
        "ring.blocks",
        "moe_parallel.kernels",
    ):
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            module = importlib.import_module(f"{package}.{info.name}")
            found |= {name: x for name, x in vars(module).items() if name.endswith("_kernel")}
    return {
        name: kernel
        for name, kernel in found.items()
        if in_gluon or not getattr(kernel, "is_gluon", bool)()
    }


def test_every_kernel_runs() -> None:
    every, ran = kernels(), set()
    for name, kernel in every.items():

        def note(*args: Any, name: str = name, run: Any = kernel.run, **kwargs: Any) -> Any:
            ran.add(name)
            return run(*args, **kwargs)

        patcher = patch.object(kernel, "run", note)
        patcher.start()
    try:
        sanitize.run_all()
    finally:
        patch.stopall()
    assert len(every) > 10
    assert ran == set(every)
