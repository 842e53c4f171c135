"""The parts of a lightning layer before and after the attention, by its options."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.impl import Impl
from lasp._core.operators import Operators
from lasp._core.rotary import apply_rotary
from lasp.layers.norm_gate import grouped_norm_gate, norm_gate, silu_split
from lasp.layers.options import LightningOptions
from lasp.lightning.validation import check_layout
from lasp.sequence.layout import Order, SequenceLayout


class GatedNorm(nn.RMSNorm):
    """The output norm of the options, its weight over the features of all heads, and the gate.

    An RMSNorm to whoever sorts parameters by the kind of their module; called as a module, so that
    wrappers which gather parameters in hooks gather this one.
    """

    def __init__(
        self,
        size: int,
        options: LightningOptions,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(size, options.norm_eps, device=device, dtype=dtype)
        self.options, self._fused = options, options.is_fused[1]

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Tensor | None, *, impl: Impl
    ) -> Tensor:
        """``x`` and ``gate`` ``[..., W]``; see ``lasp.layers.norm_gate``."""
        if self._fused and gate is not None:
            eps: float = self.eps  # type: ignore[assignment]  # always given here
            return norm_gate(x, gate, self.weight, eps=eps, impl=impl)
        return gated_norm(x, gate, self.weight, self.options, self.options.norm_groups)


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    options: LightningOptions,
    num_groups: int,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`lasp.layers.norm_gate.grouped_norm_gate` by the options, in ``num_groups`` groups."""
    return grouped_norm_gate(
        x,
        gate,
        weight,
        eps=options.norm_eps,
        num_groups=num_groups,
        silu=options.gate == "silu",
        gate_first=options.gate_first,
        tp_group=tp_group,
    )


def heads_of(
    qkv: Tensor,
    options: LightningOptions,
    norms: tuple[nn.Module, nn.Module] | None,
    *,
    layout: SequenceLayout | None,
    cp_group: dist.ProcessGroup | None,
    position_ids: Tensor | None,
    impl: Impl,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[..., T, H, head_dim]`` of projected tokens.

    Args:
        qkv: ``[..., T, H, 3 head_dim]``, head by head.
        options: of the layer.
        norms: of q and k, if the options have them.
        layout: as the layer's; with ``cp_group`` it gives the positions of the rotation.
        cp_group: likewise.
        position_ids: int64 ``[T]``, or ``[B, T]`` where the rows of a batch differ; None: those of
            the layout.
        impl: who computes the activation.

    Raises:
        ValueError: for ``position_ids`` of other shapes.
    """
    head_dim = qkv.shape[-1] // 3
    if options.activation == "silu":
        q, k, v = silu_split(qkv, head_dim, head_dim, impl=impl)
    else:
        q, k, v = qkv.split(head_dim, dim=-1)
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    if options.rotary_dim:
        if position_ids is None:
            position_ids = positions(q, layout, cp_group)
        elif position_ids.shape not in (q.shape[-3:-2], q.shape[:-2]):
            raise ValueError(
                f"position_ids must be {list(q.shape[-3:-2])}, or {list(q.shape[:-2])} as the"
                f" tokens, got shape {tuple(position_ids.shape)}"
            )
        q, k = (_rotate(x, position_ids, options) for x in (q, k))
    return q, k, v


def _rotate(x: Tensor, position_ids: Tensor, options: LightningOptions) -> Tensor:
    rows = x.flatten(0, 1) if position_ids.dim() == 2 else x
    turned = apply_rotary(
        rows,
        position_ids.flatten(),
        rotary_dim=options.rotary_dim,
        base=options.rope_base,
        scaling=options.rope_scaling,
    )
    return turned.view(x.shape)


def positions(
    q: Tensor, layout: SequenceLayout | None, cp_group: dist.ProcessGroup | None
) -> Tensor:
    """Position of each token of ``q [..., T, H, K]`` within its document: int64 ``[T]``.

    An operator, so that a compiled graph is good for every pack.

    Raises:
        ValueError: if the layout is of another length or of another number of ranks.
    """
    if layout is None:
        return torch.arange(q.shape[-3], device=q.device)
    group = "" if cp_group is None else cp_group.group_name
    found: Tensor = _call_positions(q, layout._lengths, layout.num_ranks, layout.order, group)
    return found


def _positions(q: Tensor, lengths: Tensor, num_ranks: int, order: Order, group: str) -> Tensor:
    layout = SequenceLayout.from_lengths_tensor(lengths, num_ranks, order)
    cp_group = _resolve_process_group(group) if group else None  # type: ignore[arg-type]
    return layout.position_ids(check_layout(layout, cp_group, q), q.device)


_OPERATORS = Operators("lasp")
_call_positions = _OPERATORS.define(
    "positions(Tensor q, Tensor lengths, int num_ranks, str order, str group) -> Tensor",
    _positions,
    lambda q, *_: q.new_empty(q.shape[-3], dtype=torch.int64),
)
