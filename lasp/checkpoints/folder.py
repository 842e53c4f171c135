"""A folder that appears whole or not at all, and the small files beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Files of the weights themselves, which are written anew.
_WEIGHTS = (".safetensors", ".distcp", ".bin", ".pt", ".pth", ".gguf")
_OF_WEIGHTS = (
    "config.json",
    "metadata.json",
    "model.safetensors.index.json",
    ".metadata",
    "latest_checkpointed_iteration.txt",
)
_LARGEST_FILE_BYTES = 64 * 2**20


def check_free(out: Path) -> None:
    """Raise ValueError unless a folder can be written."""
    if out.exists():
        raise ValueError(f"the folder to write must not be there yet, got {out}: name another")
    if not out.parent.is_dir():
        raise ValueError(f"the folder to write must be in one that is there, got {out}")


def unfinished(out: Path) -> Path:
    """Where a folder is while it is written; what an earlier run left there goes."""
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Gives a folder to write into, which gets the name ``out`` when all went well.

    Raises:
        ValueError: if ``out`` is there.
    """
    check_free(out)
    folder = unfinished(out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.rename(out)


def write_fields(folder: Path, fields: dict[str, Any]) -> None:
    """Write config.json."""
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def copy_small_files(source: Path, folder: Path) -> None:
    """Copy the tokenizer and what else lies beside weights and config."""
    for path in sorted(source.iterdir()):
        is_weights = path.suffix in _WEIGHTS or path.name in _OF_WEIGHTS
        if path.is_file() and not is_weights and path.stat().st_size <= _LARGEST_FILE_BYTES:
            shutil.copyfile(path, folder / path.name)
