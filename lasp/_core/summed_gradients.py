"""Whose gradients a wrapper sums over ranks in the backward, so that nobody sums them again."""

from __future__ import annotations

from torch import nn


def mark_summed(parameter: nn.Parameter) -> None:
    """Note that hooks of this parameter sum its gradients."""
    parameter.summed_in_backward = True  # type: ignore[attr-defined]


def any_summed(model: nn.Module) -> bool:
    """Whether gradients of a parameter are summed by marked hooks or, as it is sharded, by FSDP."""
    return any(map(_is_summed, model.parameters()))


def _is_summed(parameter: nn.Parameter) -> bool:
    mesh = getattr(parameter, "device_mesh", None)
    # Split experts that are DTensors without FSDP lie on the axes ep and etp alone. The mesh that
    # fully_shard makes by itself has no names.
    if mesh is not None and not set(mesh.mesh_dim_names or ("",)) <= {"ep", "etp"}:
        return True
    return getattr(parameter, "summed_in_backward", False)
