"""A format's table laid over one model: its tensors, and their atoms there and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.checkpoints.atoms import Atom, Shape, atoms_of
from lasp.checkpoints.family import Family, Join
from lasp.hybrid.config import HybridConfig

# Larger tensors, such as an embedding, are written into a checkpoint of torch in pieces.
PIECE_BYTES = 2**28


class MappedTensor(NamedTuple):
    """A tensor of a format, or the part of it that one expert has.

    Attributes:
        name: of the tensor.
        expert: index along its first dim; None: the whole tensor.
        atoms: that it joins.
        join: how.
        groups: of rows that each atom has: heads, key heads, or 1.
        part: shape of this part.
        shape: of the whole tensor.
    """

    name: str
    expert: int | None
    atoms: tuple[Atom, ...]
    join: Join
    groups: int
    part: Shape
    shape: Shape

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of this part."""
        return torch.Size(self.part).numel() * dtype.itemsize

    def row_pieces(self, dtype: torch.dtype) -> list[slice | None]:
        """Rows to write at once: pieces of a large tensor of one atom; None: all at once."""
        count = -(-self.num_bytes(dtype) // PIECE_BYTES)
        if count == 1 or len(self.atoms) > 1 or self.expert is not None:
            return [None]
        rows = -(-self.part[0] // count)
        return [slice(at, min(at + rows, self.part[0])) for at in range(0, self.part[0], rows)]

    def joined(self, atoms: Iterable[Tensor]) -> Tensor:
        """This part, of its atoms."""
        tensors = tuple(atoms)
        if self.join == "stack":
            return torch.stack(tensors)
        if len(tensors) == 1:
            return tensors[0]
        if self.groups == 1:
            return torch.cat(tensors)
        by_group = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def split(self, part: Tensor, shapes: Mapping[Atom, Shape]) -> dict[Atom, Tensor]:
        """The atoms, of this part: inverse of :meth:`joined`."""
        if self.join == "stack":
            return dict(zip(self.atoms, part.unbind()))
        if len(self.atoms) == 1:
            return {self.atoms[0]: part}
        rows = [shapes[atom][0] // self.groups for atom in self.atoms]
        pieces = part.unflatten(0, (self.groups, -1)).split(rows, dim=1)
        return {atom: piece.flatten(0, 1) for atom, piece in zip(self.atoms, pieces)}


def mapped(family: Family, config: HybridConfig) -> list[MappedTensor]:
    """Every tensor of a model in a format, in the order of the model.

    Raises:
        ValueError: if the format has no tensor for an atom of the model.
    """
    shapes = atoms_of(config)
    by_role = {role: rule for rule in family.rules for role in rule.roles.split()}
    groups = {"heads": config.attention.num_heads, "kv_heads": config.attention.num_kv_heads}
    done: set[Atom] = set()
    tensors = []
    for atom in shapes:
        if atom in done:
            continue
        if (rule := by_role.get(atom.role)) is None:
            raise ValueError(
                f"the model must be one that the format {family.name} has names for, got one with"
                f" {atom}: write another format, or change the config"
            )
        atoms = tuple(
            other for role in rule.roles.split() if (other := atom._replace(role=role)) in shapes
        )
        done.update(atoms)
        rows = sum(shapes[other][0] for other in atoms), *shapes[atom][1:]
        part = (len(atoms), *shapes[atom]) if rule.join == "stack" else rows
        stacked = atom.expert is not None and "{expert}" not in rule.tensor
        names = {} if atom.layer is None else family.prefixes(atom.layer, config.num_layers)
        tensors.append(
            MappedTensor(
                rule.tensor.format(**names, expert=atom.expert),
                atom.expert if stacked else None,
                atoms,
                rule.join,
                groups.get(rule.join, 1),
                part,
                (config.moe.num_experts, *part) if stacked and config.moe else part,
            )
        )
    return tensors
