"""What Megatron's dist checkpoints hold beside tensors, so that its loader takes them.

Megatron's linear layers save an object each that holds nothing without float8, and ask for it when
they load.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from lasp.checkpoints.mapping import MappedTensor

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


def write_common(folder: Path) -> None:
    """The state that all ranks share, empty, and the format of the folder."""
    torch.save({}, folder / "common.pt")
    described = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / "metadata.json").write_text(json.dumps(described))
