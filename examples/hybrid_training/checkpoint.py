"""Checkpoints by ``torch.distributed.checkpoint``: saved under one parallel layout, read under any.

Replicated tensors are written once; the experts' are DTensors over (edp, ep, etp), so that the
library re-cuts them when the number of ranks, ep or etp has changed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hybrid_training.optimizer import Trainer
from moe_parallel import ExpertTopology


class Checkpointer:
    """Reads and writes ``<folder>/step-<n>``; keeps the newest two."""

    def __init__(self, folder: Path, topology: ExpertTopology, device: torch.device) -> None:
        self.folder = folder
        ranks = torch.arange(topology.world_size).view(topology.edp, topology.ep, topology.etp)
        self._mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("edp", "ep", "etp"))

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
        save(self._state(trainer), checkpoint_id=self.folder / f"step-{step}")
        if dist.get_rank() == 0:
            for path in sorted(self.folder.glob("step-*"), key=lambda p: int(p.name[5:]))[:-2]:
                shutil.rmtree(path)

    def load(self, trainer: Trainer, step: int) -> None:
        """Read a checkpoint in place, whatever parallel layout wrote it."""
        state = self._state(trainer)
        load(state, checkpoint_id=self.folder / f"step-{step}")
        parameters = dict(trainer.model.named_parameters())
        with torch.no_grad():
            for name, master in trainer.masters.items():
                trainer.adamw.state[master]["step"].fill_(step)
                if parameters[name] is not master:
                    parameters[name].copy_(master)

    def _state(self, trainer: Trainer) -> dict[str, Any]:
        """Tensors by name that share the trainer's memory."""
        sharding = {
            f"layers.{index}.moe.experts.{name}": dims
            for index, layer in enumerate(trainer.model.decoder_layers())
            for name, dims in layer.moe.experts.sharding().items()
        }

        def distributed(name: str, tensor: Tensor) -> Tensor:
            if name not in sharding:
                return tensor
            ep_dim, etp_dim = sharding[name]
            placements: list[Placement] = [Replicate(), Shard(ep_dim), Shard(etp_dim)]
            return DTensor.from_local(tensor, self._mesh, placements, run_check=False)

        return {
            part: {
                name: distributed(
                    name,
                    master.detach() if part == "weight" else trainer.adamw.state[master][part],
                )
                for name, master in trainer.masters.items()
            }
            for part in ("weight", "exp_avg", "exp_avg_sq")
        }
