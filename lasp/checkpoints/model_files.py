"""A hybrid model from released files, and into them, whole or cut over ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.checks import check_flags, check_part, check_sizes
from lasp._core.collectives import all_gather
from lasp._core.dtensors import local
from lasp.checkpoints.atoms import WIDE_ROLES, Atom, Shape, atoms_of
from lasp.checkpoints.configs import FormatName, check_same, config_fields, format_of
from lasp.checkpoints.families import PLAIN
from lasp.checkpoints.folder import copy_small_files, unfinished, whole_folder, write_fields
from lasp.checkpoints.mapping import MappedTensor, mapped
from lasp.checkpoints.safetensors_folder import plan_shards, read_json, write_index, write_shards
from lasp.checkpoints.source import CONFIG, open_source
from lasp.hybrid.config import HybridConfig
from lasp.hybrid.model import HybridModel
from moe_parallel import ParallelGroups

# The dim of an expert's atom that is cut over ETP.
_ETP_DIMS = {"experts.gate": 0, "experts.up": 0, "experts.down": 1}


class _Place(NamedTuple):
    """This rank among those that share the experts."""

    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int

    @classmethod
    def of(cls, groups: ParallelGroups | None) -> _Place:
        ep, etp = (None, None) if groups is None else (groups.ep, groups.etp)
        return cls(*_rank_and_size(ep), *_rank_and_size(etp))

    def local_index(self, expert: int, num_experts: int) -> int | None:
        """Index of an expert among those of this rank; None if it has it not."""
        held = num_experts // self.ep_size
        index = expert - self.ep_rank * held
        return index if 0 <= index < held else None

    def cut(self, atom: Atom, shape: Shape) -> tuple[slice, ...] | None:
        """What this rank has of an atom; None: all."""
        dim = _ETP_DIMS.get(atom.role)
        if dim is None or self.etp_size == 1:
            return None
        size = shape[dim] // self.etp_size
        part = slice(self.etp_rank * size, (self.etp_rank + 1) * size)
        return (part, slice(None)) if dim == 0 else (slice(None), part)


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank(), group.size())


@torch.no_grad()
def load_model(
    folder: Path,
    *,
    config: HybridConfig | None,
    groups: ParallelGroups | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> HybridModel:
    """See :meth:`lasp.hybrid.HybridModel.from_pretrained`."""
    check_part("config", config, HybridConfig, optional=True)
    source = open_source(folder)
    if config is not None:
        check_same(config, source.config, "config.json")
    dtype = dtype or source.dtype(Atom("embedding"))
    model = HybridModel(config or source.config, groups=groups, device="meta", dtype=dtype)
    model.to_empty(device=device or torch.get_default_device())
    for buffer in model.buffers():
        buffer.zero_()
    state, place = _state(model), _Place.of(groups)
    for tensor in mapped(PLAIN, model.config):
        part = state[tensor.name]
        if tensor.expert is not None:
            index = place.local_index(tensor.expert, tensor.shape[0])
            if index is None:
                continue
            part = part[index]
        cuts = [place.cut(atom, source.shapes[atom]) for atom in tensor.atoms]
        part.copy_(tensor.joined(map(source.atom, tensor.atoms, cuts)))
    return model


def _state(model: HybridModel) -> dict[str, Tensor]:
    """Parameters and buffers by name, this rank's parts of them."""
    return {
        name: local(value.detach())
        for named in (model.named_parameters(), model.named_buffers())
        for name, value in named
    }


@torch.no_grad()
def save_model(
    model: HybridModel,
    folder: Path,
    *,
    format: FormatName | None,
    like: Path | None,
    shard_bytes: int,
    float32_routers: bool,
) -> None:
    """See :meth:`lasp.hybrid.HybridModel.save_pretrained`."""
    check_sizes(shard_bytes=shard_bytes)
    check_flags(float32_routers=float32_routers)
    if like is None:
        file_format, fields = config_fields(model.config, format)
        fields["torch_dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    else:
        fields = read_json(like / CONFIG)
        file_format = format_of(fields)
        check_same(model.config, file_format.read(fields), f"{like / CONFIG}")
    parts = _Parts(model)
    tensors = mapped(file_format.family, model.config)
    narrow = None if float32_routers else model.embedding.weight.dtype
    owners = [parts.owner(tensor) for tensor in tensors]
    sizes: list[list[tuple[str, int]]] = [[] for _ in range(parts.place.ep_size)]
    for tensor, owner in zip(tensors, owners):
        dtype = parts.dtype(tensor, narrow)
        sizes[owner].append((tensor.name, tensor.num_bytes(dtype)))
    shards = plan_shards(sizes, shard_bytes)
    group, temporary = model.groups.token, unfinished(folder)
    is_first = _rank_and_size(group)[0] == 0
    written = whole_folder(folder) if is_first else nullcontext()

    def write_parts() -> None:
        if _rank_and_size(model.groups.edp)[0] > 0:
            return
        mine = (t for t, owner in zip(tensors, owners) if owner == parts.place.ep_rank)
        made = (parts.made(tensor, narrow) for tensor in mine)
        if parts.place.etp_rank == 0:
            write_shards(temporary, shards[parts.place.ep_rank], made)
        else:
            deque(made, maxlen=0)  # its parts go to the rank that writes

    def write_rest() -> None:
        if not is_first:
            return
        total = sum(size for of_owner in sizes for _, size in of_owner)
        write_index(temporary, chain.from_iterable(shards), total)
        write_fields(temporary, fields)
        if like is not None:
            copy_small_files(like, temporary)

    with ExitStack() as stack:
        _together(group, lambda: stack.enter_context(written))
        _together(group, write_parts)
        _together(group, write_rest)
    if group is not None:
        dist.barrier(group)


class _Parts:
    """Atoms of a model as its ranks hold them."""

    def __init__(self, model: HybridModel) -> None:
        self.place, self.etp = _Place.of(model.groups), model.groups.etp
        self.shapes = atoms_of(model.config)
        self.state = _state(model)
        tensors = mapped(PLAIN, model.config)
        self._holder = {atom: tensor for tensor in tensors for atom in tensor.atoms}
        for tensor in tensors:
            self._check(tensor)

    def _check(self, tensor: MappedTensor) -> None:
        held, shape = self.state.get(tensor.name), list(tensor.shape)
        if tensor.expert is not None:
            shape[0] //= self.place.ep_size
            shape[-1 if tensor.name.endswith("w2") else -2] //= self.place.etp_size
        if held is None or tuple(held.shape) != tuple(shape):
            raise ValueError(
                f"{tensor.name} must be whole, or cut over ep and etp alone, got"
                f" {None if held is None else tuple(held.shape)} in place of {tuple(shape)}: save"
                " a sharded or adapted model by torch.distributed.checkpoint and convert that"
            )

    def owner(self, tensor: MappedTensor) -> int:
        """The EP rank that writes a tensor of the files."""
        expert = tensor.atoms[0].expert
        if expert is None:
            return 0
        return expert // (self._holder[tensor.atoms[0]].shape[0] // self.place.ep_size)

    def dtype(self, tensor: MappedTensor, narrow: torch.dtype | None) -> torch.dtype:
        """In which it is written."""
        atom = tensor.atoms[0]
        if narrow is not None and atom.role in WIDE_ROLES:
            return narrow
        return self.state[self._holder[atom].name].dtype

    def made(self, tensor: MappedTensor, narrow: torch.dtype | None) -> Tensor:
        """A tensor of the files, whole; a collective of its ETP ranks."""
        joined = tensor.joined(self._atom(atom) for atom in tensor.atoms)
        return joined.to("cpu", self.dtype(tensor, narrow), copy=True)

    def _atom(self, atom: Atom) -> Tensor:
        holder = self._holder[atom]
        part = self.state[holder.name]
        if holder.expert is not None:
            index = self.place.local_index(holder.expert, holder.shape[0])
            assert index is not None
            part = part[index]
        if self.place.etp_size == 1 or holder.expert is None:
            return holder.split(part, self.shapes)[atom]
        if holder.join == "stack":
            part = part[holder.atoms.index(atom)]
        return torch.cat(all_gather(part, self.etp).unbind(), _ETP_DIMS[atom.role])


def _together(group: dist.ProcessGroup | None, act: Callable[[], object]) -> None:
    """Act on every rank; where one raises, all do.

    Communication: one gather of errors.
    """
    error: Exception | None = None
    try:
        act()
    except (ValueError, OSError, RuntimeError) as caught:
        error = caught
    mine = None if error is None else str(error)
    errors: list[str | None] = [mine] * _rank_and_size(group)[1]
    if group is not None:
        dist.all_gather_object(errors, mine, group=group)
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise ValueError(f"rank {rank} must write its part, got the error: {message}")
