"""Megatron's self-attention with the positions of the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp._core.rotary import RopeScaling, check_rotary_dim, rotary_table, rotated
from lasp.hybrid.attention import check_dense
from lasp.megatron.checks import groups_of, refuse_arguments, require, training_argument
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import PackedCut, check_packed_cut
from lasp.megatron.ring_core import RingCoreAttention


class RingSelfAttention(SelfAttention):
    """Megatron's self-attention with positions of the layout: RoPE right for every order.

    Megatron's RoPE takes packs for cut per document. Here angles are computed in float64 at
    ``layout.position_ids``; layers that ``config.no_rope_freq`` names rotate nothing. With
    ``config.qk_layernorm`` the heads of queries and keys are normed before, by an RMSNorm if the
    submodules name no other; ``config.attention_output_gate`` gates the output. The projections,
    their initialisation and checkpoint keys are SelfAttention's.

    Args:
        config: Megatron's.
        submodules: SelfAttention's; ``core_attention`` is :class:`RingCoreAttention`.
        layer_number: from 1.
        attn_mask_type: ``causal`` or ``no_mask``.
        pg_collection: its tp and cp groups; of the parallel state if None.
        rotary_dim: dims of each head that are rotated; 0: none. MiniMax-01: half.
        rope_base: of the wavelengths.
        rope_scaling: of the rotation, see :class:`lasp.RopeScaling`.
        dense_len: see :class:`lasp.hybrid.AttentionConfig`.
        packed_cut: how Megatron's own packs are cut, see :data:`lasp.megatron.PackedCut`.
        optional: what a Megatron version passes besides.

    Raises:
        ValueError: for options that are not supported.
    """

    # Megatron's arguments of a self-attention, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        rotary_dim: int = 0,
        rope_base: float = 10_000.0,
        rope_scaling: RopeScaling | None = None,
        dense_len: int | None = None,
        packed_cut: PackedCut | None = None,
        **optional: Any,
    ) -> None:
        part = "ring self-attention"
        require(config, part, apply_rope_fusion=False, rotary_interleaved=False)
        require(config, part, fused_single_qkv_rope=False, qk_l2_norm=False)
        require(config, part, fine_grained_activation_offloading=False)
        require(config, part, multi_latent_attention=False)
        if config.qk_layernorm:
            submodules = replace(
                submodules,
                q_layernorm=submodules.q_layernorm or ResidualNorm,
                k_layernorm=submodules.k_layernorm or ResidualNorm,
            )
        check_rotary_dim(rotary_dim, config.kv_channels)
        check_positions(config, rotary_dim, rope_base)
        check_packed_cut(packed_cut)
        tp_group, _ = groups_of(pg_collection, part, "tp", "cp")
        groups = config.num_query_groups
        if groups % tp_group.size() or config.num_attention_heads % tp_group.size():
            raise ValueError(
                f"num_attention_heads and num_query_groups must divide over {tp_group.size()}"
                f" tensor-parallel ranks, got {config.num_attention_heads} and {groups}: choose"
                " another tensor_model_parallel_size"
            )
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type=attn_mask_type,
            pg_collection=pg_collection,
            **optional,
        )
        rotates = not (config.no_rope_freq and config.no_rope_freq[layer_number - 1])
        self.rotary_dim, self.rope_base = rotary_dim if rotates else 0, rope_base
        self.rope_scaling, self.dense_len = rope_scaling, dense_len
        self.core_attention.positions_of_layout = True
        self.core_attention.packed_cut = packed_cut

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of this rank's tokens to their documents.

        Args:
            hidden_states: ``[T / tp if sequence parallel else T, B, hidden]``, B is 1 for packs.
            attention_mask: not read.
            attention_bias: must be None.
            packed_seq_params: see :func:`lasp.megatron.layout_of`.
            others: of cross attention, inference and positions; must be None:
                GPTModel(position_embedding_type="none").

        Returns:
            The output as ``hidden_states``, and the bias of the projection, not added.
        """
        refuse_arguments("ring self-attention", **others)
        core, cp_group = self.core_attention, self.core_attention.cp_group
        gathered = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        num_tokens = hidden_states.shape[0] * gathered
        layout = core.layout_of(packed_seq_params, num_tokens)
        check_dense(self.dense_len, layout.document_lengths)
        gated = self.config.attention_output_gate
        query, key, value, *gate = self.get_query_key_value_tensors(
            hidden_states, None, output_gate=gated
        )
        if self.rotary_dim:
            positions = layout.position_ids(cp_group.rank(), query.device)
            how = (self.rotary_dim, self.rope_base, self.rope_scaling, query.dtype)
            table = rotary_table(positions, *how)
            # [T, B, H, D] to [B, T, H, D] and back
            query, key = (rotated(x.transpose(0, 1), *table).transpose(0, 1) for x in (query, key))
        packed = packed_seq_params is not None
        if packed:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        output = core(
            *(query, key, value),
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        output = output.unsqueeze(1) if packed else output
        if gated:
            output = output * torch.sigmoid(gate[0].reshape(output.shape))
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(output)
        return projected


def ring_attention_spec(
    *,
    rotary_dim: int,
    rope_base: float = 10_000.0,
    rope_scaling: RopeScaling | None = None,
    dense_len: int | None = None,
    packed_cut: PackedCut | None = None,
) -> ModuleSpec:
    """Spec of a ``self_attention`` for ``TransformerLayerSubmodules``."""
    return ModuleSpec(
        module=RingSelfAttention,
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=RingCoreAttention,
            linear_proj=RowParallelLinear,
        ),
        params={
            "attn_mask_type": AttnMaskType.causal,
            "rotary_dim": rotary_dim,
            "rope_base": rope_base,
            "rope_scaling": rope_scaling,
            "dense_len": dense_len,
            "packed_cut": packed_cut,
        },
    )


def check_positions(config: TransformerConfig, rotary_dim: int, rope_base: float) -> None:
    """Raise ValueError if an option asks for other positions than RoPE of these sizes.

    GPTModel and HybridModel take ``position_embedding_type`` and ``rotary_*`` as arguments, which
    no layer sees. They are looked for where they can be: in the config (Megatron-Bridge's has them)
    and among the arguments of Megatron's training loop. What still is Megatron's default was not
    asked for. Positions that restart in rows are refused; in packs ours restart too.

    Args:
        config: Megatron's.
        rotary_dim: rotated dims of each head; 0, and positions are Megatron's affair.
        rope_base: of the wavelengths.
    """
    if not rotary_dim:
        return
    packs = any(map(training_argument, ("sft", "dataloader_inter_document_masking")))
    if training_argument("reset_position_ids") and not packs:
        raise ValueError(
            "Megatron's training argument reset_position_ids must be False with ring"
            " self-attention, got True: a row is one document; for documents whose positions"
            " restart take packs, as of --dataloader-inter-document-masking or --sft"
        )
    own = {
        "position_embedding_type": ("none", "none"),
        "rotary_base": (rope_base, 10_000),
        "rotary_percent": (rotary_dim / config.kv_channels, 1.0),
        "rotary_seq_len_interpolation_factor": (None, None),
        "seq_len_interpolation_factor": (None, None),
        "use_rope_scaling": (False, False),
        "rope_scaling": (False, False),
    }
    for name, (value, unsaid) in own.items():
        asked, where = getattr(config, name, None), "config."
        if asked is None:
            asked, where = training_argument(name), "Megatron's training argument "
        if asked is not None and asked not in (value, unsaid):
            raise ValueError(
                f"{where}{name} must be {value!r} with ring self-attention, which rotates"
                f" {rotary_dim} of {config.kv_channels} dims with base {rope_base:g} by itself, got"
                f" {asked!r}: set {value!r}, or give rotary_dim and rope_base to the spec"
            )
