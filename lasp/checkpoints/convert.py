"""From one format to another, a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lasp._core.checks import check_flags, check_one_of, check_sizes
from lasp.checkpoints import memory
from lasp.checkpoints.atoms import WIDE_ROLES, Atom
from lasp.checkpoints.configs import FormatName, config_fields, format_of
from lasp.checkpoints.dcp_folder import write_dcp
from lasp.checkpoints.families import MEGATRON_GPT, MEGATRON_HYBRID, PLAIN
from lasp.checkpoints.family import Family
from lasp.checkpoints.folder import copy_small_files, whole_folder, write_fields
from lasp.checkpoints.mapping import MappedTensor, mapped
from lasp.checkpoints.megatron_extra import extra_states, release_folder, write_common
from lasp.checkpoints.progress import progress
from lasp.checkpoints.safetensors_folder import plan_shards, write_index, write_shards
from lasp.checkpoints.source import Source

Target = Literal["plain", "megatron", "hf"]
SHARD_BYTES = 4 * 10**9
# In a config.json of a trainer's checkpoint: the files that it came from had routers in float32.
_WIDE_FIELD = "lasp_float32_routers"


@dataclass(frozen=True)
class Options:
    """What to write.

    Attributes:
        to: ``plain``, a checkpoint of ``torch.distributed.checkpoint`` with the names of
            :class:`lasp.hybrid.HybridModel`; ``megatron``, a dist checkpoint of Megatron; ``hf``,
            safetensors files.
        format: of the files; None: that of the config.json. ``minimax-native`` is what
            transformers reads, the others what was released.
        megatron_model: whose names a dist checkpoint has, ``GPTModel``'s or ``HybridModel``'s.
        shard_bytes: of a safetensors file at most, and what a conversion to files holds of them.
        float32_routers: whether weights that a trainer keeps in float32 are written so, and not in
            the dtype of all others; None: if those of the files that they came from were.
    """

    to: Target
    format: FormatName | None = None
    megatron_model: Literal["gpt", "hybrid"] = "gpt"
    shard_bytes: int = SHARD_BYTES
    float32_routers: bool | None = None
    dtype: Literal["bfloat16", "float16", "float32"] | None = None

    def __post_init__(self) -> None:
        check_one_of(Target, to=self.to)
        check_one_of(Literal["gpt", "hybrid"], megatron_model=self.megatron_model)
        if self.format is not None:
            check_one_of(FormatName, format=self.format)
        if self.dtype is not None:
            check_one_of(Literal["bfloat16", "float16", "float32"], dtype=self.dtype)
        check_sizes(shard_bytes=self.shard_bytes)
        if self.float32_routers is not None:
            check_flags(float32_routers=self.float32_routers)


class Conversion(NamedTuple):
    """What a conversion reads, writes and needs.

    Attributes:
        source: read from.
        family: names of what is written.
        tensors: written, and their dtypes.
        fields: of the config.json that is written.
        num_bytes: of the tensors.
        largest_bytes: of memory beside what Python and torch take, see
            ``lasp.checkpoints.memory``.
    """

    source: Source
    family: Family
    tensors: list[tuple[MappedTensor, torch.dtype]]
    fields: dict[str, Any]
    num_bytes: int
    largest_bytes: int


def plan(source: Source, options: Options) -> Conversion:
    """What a conversion will do; nothing is read but headers, nothing written.

    Raises:
        ValueError: if the target has no names for the model, or a tensor would be of two dtypes.
    """
    family, fields = _target(source, options)
    dtypes = _Dtypes(source, options)
    if options.to != "hf" and not source.is_trained:
        fields[_WIDE_FIELD] = dtypes.are_wide
    tensors = [(tensor, dtypes.of(tensor)) for tensor in mapped(family, source.config)]
    num_bytes = sum(tensor.num_bytes(dtype) for tensor, dtype in tensors)
    if options.to == "hf":
        largest = memory.into_files(source, tensors, options.shard_bytes)
    else:
        largest = memory.into_checkpoint(source, tensors)
    return Conversion(source, family, tensors, fields, num_bytes, largest)


def _target(source: Source, options: Options) -> tuple[Family, dict[str, Any]]:
    """Names, and config.json: that of the source where it is of the same format."""
    if options.to == "plain":
        return PLAIN, dict(source.fields)
    if options.to == "megatron":
        is_gpt = options.megatron_model == "gpt"
        return MEGATRON_GPT if is_gpt else MEGATRON_HYBRID, dict(source.fields)
    file_format = format_of(source.fields)
    fields = dict(source.fields)
    if options.format not in (None, file_format.name):
        file_format, fields = config_fields(source.config, options.format)
        kept = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "max_position_embeddings")
        fields |= {name: source.fields[name] for name in kept if name in source.fields}
    elif "text_config" in fields:
        fields = dict(fields["text_config"])
        fields.setdefault("architectures", ["MiniMaxText01ForCausalLM"])
    fields.pop(_WIDE_FIELD, None)
    if options.dtype is not None:
        fields["dtype" if "dtype" in fields else "torch_dtype"] = options.dtype
    return file_format.family, fields


class _Dtypes:
    """The dtype that each tensor is written in: that of the source, but for some of a trainer."""

    def __init__(self, source: Source, options: Options) -> None:
        self.source = source
        self.narrow = source.dtype(Atom("embedding"))
        self.cast: torch.dtype | None = None
        if options.dtype is not None:
            self.narrow = self.cast = getattr(torch, options.dtype)
        wanted = options.float32_routers
        if wanted is None:
            wanted = source.fields.get(_WIDE_FIELD, False)
        casts = options.to == "hf" and (source.is_trained or options.dtype is not None)
        self.keeps = wanted or not casts

    @property
    def are_wide(self) -> bool:
        """Whether the source has a router of another dtype than its embedding."""
        routers = [atom for atom in self.source.shapes if atom.role in WIDE_ROLES]
        narrow = self.source.dtype(Atom("embedding"))
        return any(self.source.dtype(atom) != narrow for atom in routers)

    def of(self, tensor: MappedTensor) -> torch.dtype:
        role = tensor.atoms[0].role
        if not self.keeps and role in WIDE_ROLES:
            return self.narrow
        if self.cast is not None and role not in (*WIDE_ROLES, "router_bias"):
            return self.cast
        found = {self.source.dtype(atom) for atom in tensor.atoms}
        if len(found) > 1:
            raise ValueError(
                f"{', '.join(map(str, tensor.atoms))} must be of one dtype to be {tensor.name}, got"
                f" {sorted(map(str, found))}: cast them first"
            )
        return found.pop()


def convert(conversion: Conversion, out: Path, options: Options) -> None:
    """Write a checkpoint, under a temporary name until it is whole.

    Args:
        conversion: of :func:`plan`.
        out: the folder to write, which must not be there.
        options: as for the plan.

    Raises:
        ValueError: if ``out`` is there.
    """
    source, dtypes = conversion.source, dict(conversion.tensors)
    with whole_folder(out) as folder, progress(conversion.num_bytes) as advance:

        def make(tensor: MappedTensor, rows: slice | None = None) -> Tensor:
            cut = None if rows is None else (rows, *[slice(None)] * (len(tensor.part) - 1))
            made = tensor.joined(source.atom(atom, cut) for atom in tensor.atoms)
            made = made.to(dtypes[tensor])
            advance(made.nbytes)
            return made

        if options.to == "hf":
            made = map(make, dtypes)
            made = map(_owned, made) if source.is_trained else made
            _write_files(folder, conversion, made, options.shard_bytes)
        elif options.to == "plain":
            write_dcp(folder, conversion.tensors, make, prefix="model.", extra={})
        else:
            release = release_folder(folder)
            write_dcp(release, conversion.tensors, make, extra=extra_states(dtypes))
            is_hybrid = options.megatron_model == "hybrid"
            write_common(release, source.config, is_hybrid=is_hybrid)
        copy_small_files(source.folder, folder)
        write_fields(folder, conversion.fields)


def _write_files(
    folder: Path, conversion: Conversion, made: Iterator[Tensor], shard_bytes: int
) -> None:
    sizes = [(tensor.name, tensor.num_bytes(dtype)) for tensor, dtype in conversion.tensors]
    (shards,) = plan_shards([sizes], shard_bytes)
    write_shards(folder, shards, made)
    write_index(folder, shards, conversion.num_bytes)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor, not a view of more than itself: a shard keeps it until it is written."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
