"""One of Megatron-LM's scripts on a CPU rank: ``torchrun script.py CHECKOUT SCRIPT ARGUMENTS``.

The CPU stands in for a GPU, so that the script and Megatron's training loop run as they are.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

from tests.megatron.upstream.checkout import allow_python_311, stand_in_for_gpus


class Names(TorchFunctionMode):
    """Tensors have the types of a GPU's, which Megatron's optimizer asks for; a GPU is the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return args[0].type().replace("torch.", "torch.cuda.")
        if function is torch.device and str(args[0]).startswith("cuda"):
            return torch.device("cpu")
        return function(*args, **(kwargs or {}))


def main(checkout: str, script: str, *arguments: str) -> None:
    sys.path.insert(0, checkout)
    allow_python_311()
    stand_in_for_gpus()
    torch._dynamo.config.disable = True  # else it asks the GPU what it is
    torch.accelerator.is_available = lambda: False  # so does torch's DataLoader
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.empty_cache = torch.cuda.reset_peak_memory_stats = lambda *_: None
    torch.cuda.memory_stats = lambda *_: mock.MagicMock()
    sys.argv = [script, *arguments]
    with Names():
        runpy.run_path(str(Path(checkout, script)), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
