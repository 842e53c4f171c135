"""A format as data: which tensor holds which atoms of ``lasp.checkpoints.atoms``, and how.

A rule names a tensor, the roles of its atoms, and how they are joined:

    rows      one below the other
    heads     by head: the rows of head 0 of each atom, then those of head 1, ...
    kv_heads  the same by key head
    stack     along a new first dim

Where atoms are of an expert and the name of the tensor has no ``{expert}``, the tensor has all
experts along its first dim. A rule without any of its atoms in a model is not of that model. The
same table reads and writes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

Join = Literal["rows", "heads", "kv_heads", "stack"]


class NameRule(NamedTuple):
    """A tensor of a format.

    Attributes:
        tensor: its name; ``{layer}`` stands for the prefix of a layer, ``{mlp}`` for that of the
            layer's MLP where formats have it apart, ``{expert}`` for the index of an expert.
        roles: of its atoms, in their order, with spaces between.
        join: how they are joined.
    """

    tensor: str
    roles: str
    join: Join = "rows"


@dataclass(frozen=True)
class Family:
    """A format of checkpoints.

    Attributes:
        name: for users.
        rules: of the model, then of its layers.
        layer: prefix of layer ``{}``.
        mtp_layer: prefix of the layer of multi-token prediction; None: that of layer
            ``num_layers``.
        mlps_apart: attention and MLP of layer l are layers 2 l and 2 l + 1.
        skipped: names that are no weights of the model, as a regular expression of whole names.
    """

    name: str
    rules: tuple[NameRule, ...]
    layer: str
    mtp_layer: str | None = None
    mlps_apart: bool = False
    skipped: str = r"$^"

    def prefixes(self, layer: int, num_layers: int) -> dict[str, str]:
        """What ``{layer}`` and ``{mlp}`` stand for."""
        if layer == num_layers and self.mtp_layer is not None:
            return {"layer": self.mtp_layer, "mlp": self.mtp_layer}
        if self.mlps_apart:
            return {"layer": self.layer.format(2 * layer), "mlp": self.layer.format(2 * layer + 1)}
        return {"layer": self.layer.format(layer), "mlp": self.layer.format(layer)}

    def skips(self, name: str) -> bool:
        """Whether a tensor of this name is none of the model's."""
        return re.fullmatch(self.skipped, name) is not None
