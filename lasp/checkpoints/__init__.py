"""Weights in and out: released files, checkpoints of torch and of Megatron.

``python -m lasp.checkpoints convert IN OUT --to plain|megatron|hf`` converts any into any;
:meth:`lasp.hybrid.HybridModel.from_pretrained` and ``save_pretrained`` are the same for a model in
memory. It needs ``pip install 'lasp-plus[hf]'``.
"""

from importlib.util import find_spec

if missing := [name for name in ("safetensors", "rich", "tyro") if find_spec(name) is None]:
    raise ImportError(
        f"lasp.checkpoints needs {', '.join(missing)}, not installed: pip install 'lasp-plus[hf]'"
    )

from lasp.checkpoints.configs import FORMATS, FormatName
from lasp.checkpoints.convert import Conversion, Options, Target, convert, plan
from lasp.checkpoints.safe_reader import CheckpointPlanner, CheckpointReader
from lasp.checkpoints.source import Source, open_source, read_config

__all__ = [
    "FORMATS",
    "CheckpointPlanner",
    "CheckpointReader",
    "Conversion",
    "FormatName",
    "Options",
    "Source",
    "Target",
    "convert",
    "open_source",
    "plan",
    "read_config",
]
