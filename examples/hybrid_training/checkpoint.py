"""Checkpoints by ``torch.distributed.checkpoint``: saved under one parallel layout, read under any.

The model's experts are DTensors (``moe_parallel.distribute_experts``), so that torch re-cuts them
and their moments when the number of ranks, ep or etp has changed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hybrid_training.optimizer import Trainer


class Checkpointer:
    """Reads and writes ``<folder>/step-<n>``; keeps the newest two."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> int | None:
        """Step of the newest complete checkpoint, as every rank sees it."""
        done = [int(path.parent.name[5:]) for path in self.folder.glob("step-*/.metadata")]
        return max(done, default=None)

    def start(self, trainer: Trainer, curve: dict[str, Any], *, resume: bool) -> int:
        """Begin a run in the folder, or go on from its newest checkpoint; returns the next step.

        Args:
            trainer: read into, when resuming.
            curve: options that decide the loss curve; a resumed run must have the same.
            resume: go on; else the folder must hold no checkpoint.

        Raises:
            ValueError: if there is nothing to resume, something in the way, or other options.
        """
        step, record = self.newest(), self.folder / "options.json"
        if resume and step is None:
            raise ValueError(f"out must hold a checkpoint to resume, got {self.folder}")
        if step is not None and not resume:
            raise ValueError(
                f"out must hold no checkpoints, got {self.folder} with step {step}: go on from it"
                " with --resume, or name another folder"
            )
        if step is None:
            if dist.get_rank() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                record.write_text(json.dumps(curve, indent=1))
            dist.barrier()
            return 0
        for name, saved in json.loads(record.read_text()).items():
            if curve[name] != saved:
                raise ValueError(
                    f"{name} must be {saved!r} as in the run to resume, got {curve[name]!r}"
                )
        self.load(trainer, step)
        return step

    def save(self, trainer: Trainer, step: int) -> None:
        """Write the state after ``step`` steps; a collective call of all ranks."""
        save(_state(trainer), checkpoint_id=self.folder / f"step-{step}")
        if dist.get_rank() == 0:
            for path in sorted(self.folder.glob("step-*"), key=lambda p: int(p.name[5:]))[:-2]:
                shutil.rmtree(path)

    def load(self, trainer: Trainer, step: int) -> None:
        """Read a checkpoint, whatever parallel layout wrote it."""
        state = _state(trainer)
        load(state, checkpoint_id=self.folder / f"step-{step}")
        set_model_state_dict(trainer.model, state["model"])
        set_optimizer_state_dict(trainer.model, trainer.adamw, state["optimizer"])


def _state(trainer: Trainer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(trainer.model),
        "optimizer": get_optimizer_state_dict(trainer.model, trainer.adamw),
    }
