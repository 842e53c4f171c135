"""The parts of a lightning layer before and after the attention, by its options."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from lasp._core.impl import Impl, chosen_impl
from lasp._core.rotary import rotary_table, rotated
from lasp.layers.norm_gate import norm_gate
from lasp.layers.options import LightningOptions
from lasp.sequence.layout import SequenceLayout
from lasp.sequence.positions import positions


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
        self.options = options

    def forward(  # type: ignore[override]
        self, x: Tensor, gate: Tensor | None, *, impl: Impl
    ) -> Tensor:
        """``x`` and ``gate`` ``[..., W]``; see ``lasp.layers.norm_gate``."""
        options = self.options
        return gated_norm(x, gate, self.weight, options, options.norm_groups, impl=impl)


class HeadNorm(nn.RMSNorm):
    """An RMSNorm over each head; called with None it returns its weight, for who norms by it.

    As a module, so that wrappers which gather parameters in hooks gather this one.
    """

    def forward(self, x: Tensor | None) -> Tensor:
        """``x [..., H, head_dim]`` normed, or the weight."""
        return self.weight if x is None else super().forward(x)


def gated_norm(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    options: LightningOptions,
    num_groups: int,
    tp_group: dist.ProcessGroup | None = None,
    *,
    impl: Impl,
) -> Tensor:
    """:func:`lasp.layers.norm_gate.norm_gate` by the options, in ``num_groups`` groups."""
    return norm_gate(
        x,
        gate,
        weight,
        eps=options.norm_eps,
        num_groups=num_groups,
        silu=options.gate == "silu",
        gate_first=options.gate_first,
        tp_group=tp_group,
        impl=impl,
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
        norms: of q and k, if the options have them: modules that norm what they are called with,
            and return their weight if that is None.
        layout: as the layer's; with ``cp_group`` it gives the positions of the rotation.
        cp_group: likewise.
        position_ids: int64 ``[T]``, or ``[B, T]`` where the rows of a batch differ; None: those of
            the layout.
        impl: ``eager``, plain torch; ``triton``, one kernel forward and one backward, which keeps
            the projection and the table of the rotation; ``auto``: see ``lasp._core.impl``.

    Raises:
        ValueError: for ``position_ids`` of other shapes.
    """
    head_dim, silu = qkv.shape[-1] // 3, options.activation == "silu"
    table = None
    if options.rotary_dim:
        if position_ids is None:
            position_ids = positions("q", qkv, -3, layout, cp_group)
        elif position_ids.shape not in (qkv.shape[-3:-2], qkv.shape[:-2]):
            raise ValueError(
                f"position_ids must be {list(qkv.shape[-3:-2])}, or {list(qkv.shape[:-2])} as the"
                f" tokens, got shape {tuple(position_ids.shape)}"
            )
        how = (options.rotary_dim, options.rope_base, options.rope_scaling, qkv.dtype)
        table = rotary_table(position_ids.expand(qkv.shape[:-2]).flatten(), *how)
    rows = qkv if qkv.dim() == 3 else qkv.reshape(-1, *qkv.shape[-2:])
    nothing = norms is None and table is None and not silu
    if nothing or chosen_impl(impl, qkv.device, qkv.dtype) == "eager":
        parts = _heads(F.silu(rows) if silu else rows, norms, table)
    else:
        from lasp.layers.triton import heads

        weights = (None, None) if norms is None else [norm(None) for norm in norms]
        parts = heads.call(rows, *weights, *(table or (None, None)), silu, options.norm_eps)
    if qkv.dim() == 3:
        return parts
    q, k, v = (x.view(*qkv.shape[:-1], head_dim) for x in parts)
    return q, k, v


def _heads(
    rows: Tensor, norms: tuple[nn.Module, nn.Module] | None, table: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`heads_of` activated rows ``[T, H, 3 head_dim]``, in plain torch."""
    q, k, v = rows.chunk(3, dim=-1)
    if norms is not None:
        q, k = norms[0](q), norms[1](k)
    if table is not None:
        q, k = rotated(q, *table), rotated(k, *table)
    return q, k, v
