"""Checkpoints by ``torch.distributed.checkpoint``: saved under one parallel layout, read under any.

The model's experts are DTensors (``moe_parallel.distribute_experts``), so that torch re-cuts them
and their moments when the number of ranks, ep or etp has changed.

A checkpoint gets its name when all of it is on the disk, with the digests of its files::

    step-100/             whole: .metadata, __0_0.distcp ..., files.json
    step-200.unfinished/  is being written, or was when the run died; the next run removes it
    step-200.damaged/     had other bytes than files.json says, and was set aside
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hybrid_training.folder import FolderLock, digests, on_all, on_first, write_whole
from hybrid_training.optimizer import Trainer
from lasp.checkpoints import CheckpointPlanner, CheckpointReader

KEPT = 2
FILES = "files.json"


class Checkpointer:
    """Reads and writes ``<folder>/step-<n>``; keeps the newest two. Every rank calls it alike.

    Args:
        folder: of the run, which all ranks see.

    Raises:
        ValueError: on every rank, if another run that is alive has the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock: FolderLock | None = None
        on_first(self._take)

    def _take(self) -> None:
        self.lock = FolderLock(self.folder)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were finished, newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def newest(self) -> int | None:
        """Step of the newest checkpoint that has the bytes that were written; None: there is none.

        Rank 0 says which others were damaged, and sets them aside.

        Communication: gathers of objects for each checkpoint that is read.

        Raises:
            ValueError: if there are checkpoints and all of them are damaged.
        """
        steps = on_first(self.steps)
        if not steps:
            return None
        if (step := next(filter(self._is_whole, steps), None)) is None:
            raise ValueError(
                f"out must hold a whole checkpoint to resume, got {self.folder} in which all"
                f" {len(steps)} are damaged: see *.damaged there, or name another folder"
            )
        return step

    def _is_whole(self, step: int) -> bool:
        path = self.folder / f"step-{step}"
        damage = [line for lines in on_all(lambda: _damage(path)) for line in lines]
        if damage:
            on_first(lambda: _set_aside(path, damage))
        return not damage

    def start(self, trainer: Trainer, curve: dict[str, Any], *, resume: bool | None) -> int:
        """Begin a run in the folder, or go on from its newest checkpoint; returns the next step.

        Args:
            trainer: read into, when resuming.
            curve: options that decide the loss curve; a resumed run must have the same.
            resume: go on; if False the folder must hold no checkpoint; None: go on if it holds one.

        Raises:
            ValueError: if there is nothing to resume, something in the way, or other options.
        """
        on_first(self._clear)
        step, record = self.newest(), self.folder / "options.json"
        if resume and step is None:
            raise ValueError(f"out must hold a checkpoint to resume, got {self.folder}")
        if step is not None and resume is False:
            raise ValueError(
                f"out must hold no checkpoints, got {self.folder} with step {step}: go on from it"
                " with --resume, or name another folder"
            )
        if step is None:
            on_first(lambda: write_whole(record, json.dumps(curve, indent=1)))
            return 0
        for name, saved in on_first(lambda: json.loads(record.read_text())).items():
            if curve[name] != saved:
                raise ValueError(
                    f"{name} must be {saved!r} as in the run to resume, got {curve[name]!r}"
                )
        self.load(trainer, step)
        return step

    def _clear(self) -> None:
        """Remove what a run that died was writing, or removing."""
        for path in self.folder.glob("step-*.unfinished"):
            shutil.rmtree(path)

    def save(self, trainer: Trainer, step: int) -> None:
        """Write the state after ``step`` steps.

        Raises:
            CheckpointException: on every rank, if a rank could not write its part.
            ValueError: on every rank, if the checkpoint could not be finished.
        """
        whole = self.folder / f"step-{step}"
        unfinished = whole.with_name(f"{whole.name}.unfinished")
        save(_state(trainer), storage_writer=FileSystemWriter(unfinished))
        mine = [path.name for path in unfinished.glob(f"__{dist.get_rank()}_*")]
        written = on_all(lambda: digests(unfinished, mine))

        def finish() -> None:
            files = {name: digest for part in written for name, digest in part.items()}
            files |= digests(unfinished, [".metadata"])
            write_whole(unfinished / FILES, json.dumps(files, indent=1))
            unfinished.rename(whole)
            for old in self.steps()[KEPT:]:
                gone = self.folder / f"step-{old}.unfinished"
                (self.folder / f"step-{old}").rename(gone)
                shutil.rmtree(gone)

        on_first(finish)

    def load(self, trainer: Trainer, step: int) -> None:
        """Read a checkpoint, whatever parallel layout wrote it."""
        state = _state(trainer)
        reader = CheckpointReader(self.folder / f"step-{step}")
        load(state, storage_reader=reader, planner=CheckpointPlanner())
        set_model_state_dict(trainer.model, state["model"])
        set_optimizer_state_dict(trainer.model, trainer.adamw, state["optimizer"])


def _damage(path: Path) -> list[str]:
    """What is wrong with this rank's share of the files of a checkpoint."""
    try:
        written = json.loads((path / FILES).read_text())
        mine = sorted(written)[dist.get_rank() :: dist.get_world_size()]
        found = digests(path, mine)
    except (OSError, ValueError) as error:
        return [str(error)]
    return [f"{name} has other bytes" for name in mine if found[name] != written[name]]


def _set_aside(path: Path, damage: list[str]) -> None:
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    print(f"{path} is damaged: {'; '.join(damage)}. It is now {aside.name}", file=sys.stderr)


def _state(trainer: Trainer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(trainer.model),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.adamw),
    }
