"""What Megatron's dist checkpoints hold beside tensors, so that its loader takes them.

Megatron's linear layers save an object each that holds nothing without float8, and ask for it when
they load.
"""

from __future__ import annotations

import io
import json
import re
from argparse import Namespace
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lasp.checkpoints.mapping import MappedTensor
from lasp.checkpoints.safe_reader import check_plain_name
from lasp.hybrid.config import HybridConfig

TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"
_LINEAR = r"output_layer|.*\.(in_proj|out_proj|linear_\w+)"


def extra_states(tensors: Iterable[MappedTensor]) -> dict[str, bytes]:
    """The empty objects of the linear layers of a model, by name."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    found = {}
    for tensor in tensors:
        linear = tensor.name.removesuffix(".weight")
        if re.fullmatch(_LINEAR, linear):
            place = "0_1" if tensor.expert is None else f"{tensor.expert}_{tensor.shape[0]}"
            found[f"{linear}._extra_state/shard_{place}"] = buffer.getvalue()
    return found


def release_folder(folder: Path) -> Path:
    """Make the folder in which Megatron's ``--load`` finds weights without a state of training."""
    (folder / TRACKER).write_text(_RELEASE)
    (folder / _RELEASE).mkdir()
    return folder / _RELEASE


def newest(folder: Path) -> Path:
    """The checkpoint that Megatron's ``--load`` takes of a folder; else the folder itself.

    Raises:
        ValueError: if the folder names one that is not there.
    """
    if not (folder / TRACKER).exists():
        return folder
    step = (folder / TRACKER).read_text().strip()
    check_plain_name(step, TRACKER)
    found = folder / (f"iter_{int(step):07}" if step.isdecimal() else step)
    if not found.is_dir():
        raise ValueError(f"{folder / TRACKER} must name a folder there, got {found.name}")
    return found


def write_common(folder: Path, config: HybridConfig, *, is_hybrid: bool) -> None:
    """The state that all ranks share, and the format of the folder.

    Args:
        folder: of the checkpoint.
        config: of the model.
        is_hybrid: whether it has the names of Megatron's HybridModel.
    """
    # Megatron permutes the rows of queries, keys and values of older checkpoints.
    common: dict[str, Any] = {"checkpoint_version": 3.0}
    if is_hybrid:  # it takes a checkpoint without a pattern for one of a GPTModel
        mlps = ("E" if config.has_experts(layer) else "-" for layer in range(config.num_layers))
        pattern = "".join(chain.from_iterable(zip(config.kinds, mlps)))
        common["args"] = Namespace(hybrid_layer_pattern=pattern)
    torch.save(common, folder / "common.pt")
    described = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(described))
