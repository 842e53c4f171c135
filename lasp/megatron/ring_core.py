"""Softmax attention over context-parallel ranks as Megatron's core attention."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from lasp.megatron.batch import layout_of, order_of_rows
from lasp.megatron.checks import groups_of, parameter_device, refuse_arguments, require
from lasp.megatron.packs import PackedCut, check_packed_cut, check_rolled
from lasp.sequence.layout import SequenceLayout
from ring.attention import ring_attention

_CAUSAL = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}


class RingCoreAttention(MegatronModule):
    """A ``core_attention``: softmax attention over context-parallel ranks, packs included.

    The config's ``window_size`` with ``window_attn_skip_freq``, and its ``softmax_type`` are read:
    ``learnable`` adds the parameter ``softmax_offset``, the sinks of this rank's heads.

    Args:
        config: Megatron's.
        layer_number: from 1; says whether the layer has a window.
        attn_mask_type: ``causal`` or ``no_mask``, within each document.
        attention_type: must be ``self``.
        attention_dropout: must be 0, as in the config.
        softmax_scale: factor of the scores; None: 1 / sqrt(head dim).
        cp_comm_type: None or ``p2p``: the ring schedule decides what travels.
        pg_collection: its cp group; of the parallel state if None.
        packed_cut: how Megatron's own packs are cut, see :data:`lasp.megatron.PackedCut`.

    ``positions_of_layout``: True if queries and keys come with the positions of the layout, or with
    none. Megatron's SelfAttention rotates rows in zigzag order, and packs as zigzag in every
    document; other orders are refused over several ranks without it. :class:`RingSelfAttention`
    sets it.

    Recomputing it (``recompute_modules=["core_attn"]``) saves nothing: it keeps only q, k, v, the
    output and the log-sum-exp.

    Raises:
        ValueError: for options that are not supported.
    """

    # Megatron's arguments of a core attention.
    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        packed_cut: PackedCut | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        part = "ring attention"
        require(config, part, attention_dropout=0.0)
        require(config, part, qk_clip=False, log_max_attention_logit=False)
        require(config, part, apply_query_key_layer_scaling=False)
        require(config, part, attention_backend=AttnBackend.auto, flash_attention_version=None)
        if cp_comm_type not in (None, "p2p"):
            raise ValueError(
                f"cp_comm_type must be None or 'p2p' for {part}, got {cp_comm_type!r}: its schedule"
                " decides what travels; leave config.cp_comm_type unset"
            )
        if attention_dropout or attention_type != "self":
            raise ValueError(
                "ring attention must be self-attention without dropout, got attention_type"
                f" {attention_type!r}, attention_dropout {attention_dropout}: leave dropout at 0,"
                " and cross attention to Megatron's modules"
            )
        self._check_mask_type(attn_mask_type)
        (self.cp_group,) = groups_of(pg_collection, part, "cp")
        self.attn_mask_type, self.softmax_scale = attn_mask_type, softmax_scale
        self.window = _window_of(config, layer_number, _CAUSAL[attn_mask_type])
        self.softmax_offset: Tensor | None = None
        if config.softmax_type != "vanilla":
            (self.tp_group,) = groups_of(pg_collection, part, "tp")
            self._add_sinks(config)
        self.positions_of_layout = False
        check_packed_cut(packed_cut)
        self.order, self.packed_cut = order_of_rows(config, part), packed_cut
        self.rolled = bool(config.mtp_num_layers)

    def _add_sinks(self, config: TransformerConfig) -> None:
        """Megatron's ``softmax_offset``: zeros, or a parameter, one a head of this rank."""
        heads, dtype = config.num_attention_heads // self.tp_group.size(), config.params_dtype
        sinks = torch.zeros(heads, device=parameter_device(config), dtype=dtype)
        del self.softmax_offset
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", sinks, persistent=False)
            return
        if config.softmax_type != "learnable":
            raise ValueError(
                "config.softmax_type must be 'vanilla', 'off-by-one' or 'learnable' for ring"
                f" attention, got {config.softmax_type!r}: choose one of these"
            )
        self.softmax_offset = nn.Parameter(sinks)
        for name, value in (("tensor_model_parallel", True), ("partition_dim", 0)):
            setattr(self.softmax_offset, name, value)
        self.softmax_offset.partition_stride = 1  # type: ignore[attr-defined]
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sinks, cut over tp; nothing without learnable ones."""
        if not isinstance(self.softmax_offset, nn.Parameter):
            return {}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )
        return sharded

    def layout_of(
        self, packed_seq_params: PackedSeqParams | None, num_tokens: int
    ) -> SequenceLayout:
        """Layout of a batch: :func:`lasp.megatron.layout_of` of ``num_tokens`` on this rank."""
        cp_size = self.cp_group.size()
        layout = layout_of(packed_seq_params, num_tokens, cp_size, self.order, self.packed_cut)
        if self.rolled:
            check_rolled(layout, packed_seq_params is not None)
        return layout

    @staticmethod
    def _check_mask_type(mask_type: AttnMaskType) -> None:
        if mask_type not in _CAUSAL:
            raise ValueError(
                f"attn_mask_type must be one of {[m.name for m in _CAUSAL]}, got {mask_type}: pass"
                " it in the ModuleSpec's params; padding is a document of the layout"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """Attention of this rank's tokens.

        Args:
            query: ``[T, B, heads, D]``, or ``[T, heads, D]`` for a pack.
            key: likewise, with the key heads.
            value: as ``key``.
            attention_mask: not read: ``attn_mask_type`` and the documents are the mask.
            attn_mask_type: that of the constructor if None.
            attention_bias: must be None.
            packed_seq_params: see :func:`lasp.megatron.layout_of`.

        Returns:
            ``[T, B, heads * D]``, or ``[T, heads * D]`` for a pack.
        """
        refuse_arguments("ring attention", attention_bias=attention_bias)
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        self._check_mask_type(mask_type)
        packed = packed_seq_params is not None
        layout = self.layout_of(packed_seq_params, query.shape[0])
        # Nothing here tells whether query and key were rotated.
        as_rotated = layout.order == ("document_zigzag" if packed else "zigzag")
        if layout.num_ranks > 1 and not (as_rotated or self.positions_of_layout):
            raise ValueError(
                f"core_attention.positions_of_layout must be True for {layout.order}"
                f" {'packs' if packed else 'rows'} over {layout.num_ranks} context-parallel ranks,"
                " got False: Megatron rotates rows in zigzag order, and packs as zigzag in every"
                " document; take ring_attention_spec(rotary_dim=...), or set it in a model without"
                " RoPE"
            )
        batched = query.dim() == 4
        q, k, v = (x.transpose(0, 1) if batched else x for x in (query, key, value))
        output = ring_attention(
            q,
            k,
            v,
            layout=layout,
            cp_group=self.cp_group,
            causal=_CAUSAL[mask_type],
            window=self.window,
            sinks=self.softmax_offset,
            scale=self.softmax_scale,
        ).output.flatten(-2)
        return output.transpose(0, 1).contiguous() if batched else output


def _window_of(
    config: TransformerConfig, layer_number: int, causal: bool
) -> tuple[int, int] | None:
    """The window of a layer; None where it sees all."""
    size = config.window_size
    if not is_layer_window_attention(size, config.window_attn_skip_freq, layer_number):
        return None
    assert size is not None  # such a layer has one
    if len(size) != 2 or any(type(side) is not int or side < -1 for side in size):
        raise ValueError(
            "config.window_size must be (left, right), two integers >= -1, for ring attention, got"
            f" {size!r}: -1 is no limit"
        )
    if causal and size[1] > 0:
        raise ValueError(
            "config.window_size must end at the query under a causal mask for ring attention, got"
            f" {size!r}: set ({size[0]}, 0)"
        )
    return (size[0], size[1])
