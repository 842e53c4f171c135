"""config.json of each format as a :class:`lasp.hybrid.HybridConfig`, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, is_dataclass, replace
from textwrap import shorten
from typing import Any, Literal, get_args

from lasp.checkpoints.configs import bailing, minimax, sala
from lasp.checkpoints.configs.fields import Json
from lasp.checkpoints.families import BAILING, MINIMAX, SALA
from lasp.checkpoints.family import Family
from lasp.hybrid.config import HybridConfig
from moe_parallel import MoEConfig

FormatName = Literal["minimax", "minimax-native", "bailing", "sala"]


@dataclass(frozen=True)
class FileFormat:
    """Weights in safetensors files with a config.json, as a model's makers released them.

    Attributes:
        name: for users.
        family: names of the tensors.
        classes: ``architectures`` of its configs.
        read: the model of a config.
        write: the config of a model.
    """

    name: FormatName
    family: Family
    classes: tuple[str, ...]
    read: Callable[[Json], HybridConfig]
    write: Callable[[HybridConfig], dict[str, Any]]


FORMATS: dict[FormatName, FileFormat] = {
    file_format.name: file_format
    for file_format in (
        FileFormat(
            "minimax",
            MINIMAX,
            (
                "MiniMaxText01ForCausalLM",
                "MiniMaxM1ForCausalLM",
                "MiniMaxVL01ForConditionalGeneration",
            ),
            minimax.read_released,
            minimax.write_released,
        ),
        FileFormat(
            "minimax-native",
            MINIMAX,
            ("MiniMaxForCausalLM",),
            minimax.read_native,
            minimax.write_native,
        ),
        FileFormat(
            "bailing",
            BAILING,
            bailing.GQA_CLASSES + bailing.LATENT_CLASSES,
            bailing.read,
            bailing.write,
        ),
        FileFormat("sala", SALA, sala.CLASSES, sala.read, sala.write),
    )
}


def format_of(fields: Json) -> FileFormat:
    """The format of a config.json, by its class.

    Raises:
        ValueError: for the class of another model.
    """
    classes = fields.get("architectures") or []
    for file_format in FORMATS.values():
        if set(classes) & set(file_format.classes):
            return file_format
    known = [name for file_format in FORMATS.values() for name in file_format.classes]
    raise ValueError(
        f"architectures of config.json must be one of {known}, got {classes}: models with"
        " lightning attention are read"
    )


def config_fields(
    config: HybridConfig, name: FormatName | None = None
) -> tuple[FileFormat, dict[str, Any]]:
    """The format and config.json of a model.

    Args:
        config: of the model.
        name: of the format; None: the first that can say what the model is.

    Raises:
        ValueError: naming what the format cannot say.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"format must be one of {get_args(FormatName)}, got {name!r}")
    refusals = []
    for file_format in FORMATS.values() if name is None else [FORMATS[name]]:
        try:
            fields = file_format.write(config)
            check_same(config, file_format.read(fields), f"the format {file_format.name}")
        except ValueError as error:
            refusals.append(f"{file_format.name}: {error}")
        else:
            return file_format, fields
    raise ValueError("config must be of a model that a format has: " + "; ".join(refusals))


def check_same(config: HybridConfig, back: HybridConfig, name: str) -> None:
    """Raise ValueError unless a config says the same of the model after it was written and read."""
    for (field, ours), (_, read) in zip(_leaves(_model_of(config)), _leaves(_model_of(back))):
        close = isinstance(ours, float) and isinstance(read, float)
        if ours != read and not (close and abs(ours - read) <= 1e-12 * abs(ours)):
            shown = shorten(repr(ours), 80)  # rates of all layers are long
            raise ValueError(f"{field} must be {read!r} in {name}, got {shown}")


def _model_of(config: HybridConfig) -> HybridConfig:
    """The model without what concerns training or who computes."""
    formula = isinstance(config.decay, str)
    moe = config.moe and MoEConfig(
        config.moe.hidden_size,
        config.moe.ffn_size,
        config.moe.num_experts,
        config.moe.top_k,
        router=replace(config.moe.router, sequence_loss_coefficient=0.0, z_loss_coefficient=0.0),
        shared_ffn_size=config.moe.shared_ffn_size,
        shared_gate=config.moe.shared_gate,
    )
    return replace(
        config,
        moe=moe,
        pattern=config.kinds,
        residuals=replace(config.residuals_or_deepnorm, init_gain=1.0),
        vocabulary=replace(config.vocabulary, float32_head=False),
        num_decay_layers=(config.num_decay_layers or config.num_layers) if formula else None,
        mtp_loss_weight=None if config.mtp_loss_weight is None else 1.0,
        lightning_impl="auto",
        exchange="auto",
    )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of nested configs by their paths."""
    fields = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if not isinstance(fields, dict):
        yield name, tuple(value) if isinstance(value, tuple) else value
        return
    for key, inner in fields.items():
        yield from _leaves(inner, f"{name}.{key}".lstrip("."))
