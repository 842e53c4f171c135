"""Released files in and out of a model, by ``lasp.checkpoints``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lasp.hybrid.config import HybridConfig
from moe_parallel import ParallelGroups

if TYPE_CHECKING:
    from lasp.checkpoints import FormatName
    from lasp.hybrid.model import HybridModel


class PretrainedModel(nn.Module):
    """What :class:`lasp.hybrid.HybridModel` does with files; needs the extra ``hf``."""

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        *,
        config: HybridConfig | None = None,
        groups: ParallelGroups | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> HybridModel:
        """The model of released files or of a checkpoint; each rank reads what it holds.

        Args:
            folder: with a config.json, see ``lasp.checkpoints``.
            config: that of the folder with other options of training; None: as
                :func:`lasp.checkpoints.read_config` reads it.
            groups: as of the model.
            device: likewise, but not ``meta``; None: torch's default.
            dtype: likewise; None: that of the embedding in the files.

        Raises:
            ValueError: naming the tensor or file that is missing, broken or of another model.
        """
        from lasp.checkpoints.model_files import load_model

        return load_model(Path(folder), config=config, groups=groups, device=device, dtype=dtype)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        format: FormatName | None = None,
        like: str | Path | None = None,
        shard_bytes: int = 4 * 10**9,
        float32_routers: bool = False,
    ) -> None:
        """Write files as the model's makers released them; EP ranks write side by side.

        Args:
            folder: to write, on a file system of all ranks; it appears when it is whole.
            format: of the files; None: the first of :data:`lasp.checkpoints.FORMATS` that has the
                model.
            like: released files whose config.json and tokenizer these get; it decides the format.
            shard_bytes: of a file at most, and what a rank holds of them beside one tensor.
            float32_routers: write weights that the model keeps in float32 so, and not in the dtype
                of the embedding.

        Communication: parts of experts over etp, one at a time; errors over the token group. Every
        rank must call it.

        Raises:
            ValueError: on every rank, if the folder is there, the format cannot say what the model
                is, or parameters are cut otherwise than over ep and etp.
        """
        from lasp.checkpoints.model_files import save_model

        save_model(
            cast("HybridModel", self),
            Path(folder),
            format=format,
            like=None if like is None else Path(like),
            shard_bytes=shard_bytes,
            float32_routers=float32_routers,
        )
