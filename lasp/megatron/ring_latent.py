"""Megatron's multi-head latent attention, of which only latents cross context-parallel ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from lasp._core.rotary import RopeScaling, rotary_table, rotated
from lasp.megatron.checks import check_heads, groups_of, refuse_arguments, require
from lasp.megatron.norm import ResidualNorm
from lasp.megatron.packs import PackedCut, check_packed_cut
from lasp.megatron.ring_core import RingCoreAttention
from lasp.megatron.version import VERSION
from ring.latent_attention import ring_latent_attention


class _SumOfGradients(torch.autograd.Function):
    """What it is given; the gradient is summed over the ranks.

    With a gradient that is not contiguous, as that of a part of a latent,
    copy_to_tensor_model_parallel_region of Megatron sums a copy, and returns the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        if ctx.group.size() > 1:
            dist.all_reduce(total, group=ctx.group)
        return total, None


class KVUpProjection(ColumnParallelLinear):
    """The weight that makes keys and values of latents, which attention applies itself.

    Called as a module, so that wrappers which gather parameters in hooks gather this one.
    """

    def forward(self) -> Tensor:
        """``[H / tp * (qk_head_dim + v_head_dim), kv_lora_rank]``."""
        weight: Tensor = self.weight
        return weight


class RingLatentSelfAttention(MLASelfAttention):
    """Megatron's MLA with :func:`ring.ring_latent_attention` and positions of the layout.

    RoPE, or YaRN by ``rope_type="yarn"``, angles in float64; Megatron's pairs of neighbours.
    Projections, their initialisation and checkpoint keys are MLASelfAttention's, and so are norms,
    which ``config.qk_layernorm`` asks for. Windows and sinks are those of
    :class:`RingCoreAttention`.

    Args:
        config: Megatron's.
        submodules: MLASelfAttention's; ``core_attention`` is :class:`RingCoreAttention`,
            ``linear_kv_up_proj`` :class:`KVUpProjection`.
        layer_number: from 1.
        attn_mask_type: ``causal`` or ``no_mask``.
        pg_collection: its tp and cp groups; of the parallel state if None.
        packed_cut: how Megatron's own packs are cut, see :data:`lasp.megatron.PackedCut`.
        optional: what a Megatron version passes besides.

    Raises:
        ValueError: for options that are not supported.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        packed_cut: PackedCut | None = None,
        **optional: Any,
    ) -> None:
        part = "ring latent attention"
        if not config.multi_latent_attention:
            raise ValueError(
                f"config.multi_latent_attention must be True for {part}, got False: build a"
                " MLATransformerConfig, or take ring_attention_spec"
            )
        require(config, part, rotary_percent=1.0, apply_rope_fusion=False)
        require(config, part, cache_mla_latents=False, no_rope_freq=None, qk_l2_norm=False)
        require(config, part, fine_grained_activation_offloading=False, add_bias_linear=False)
        require(config, part, experimental_attention_variant=None, rotary_interleaved=False)
        check_packed_cut(packed_cut)
        rope_scaling = scaling_of(config)
        tp_group, _ = groups_of(pg_collection, part, "tp", "cp")
        check_heads(config.num_attention_heads, tp_group.size())
        if tp_group.size() > 1 and not config.sequence_parallel:
            raise ValueError(
                f"config.sequence_parallel must be True for {part} over {tp_group.size()}"
                " tensor-parallel ranks, got False: Megatron sums gradients of its norms over them"
            )
        normed = config.qk_layernorm
        if normed and config.q_lora_rank is None and VERSION >= (0, 19):
            raise ValueError(
                f"config.q_lora_rank must be set for {part} with qk_layernorm, got None: there"
                " Megatron-Core 0.19 norms what queries are made of, in TransformerEngine's linear"
            )
        submodules = replace(
            submodules,
            kv_layernorm=submodules.kv_layernorm if normed else IdentityOp,
            q_layernorm=submodules.q_layernorm if normed and config.q_lora_rank else IdentityOp,
        )
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type=attn_mask_type,
            pg_collection=pg_collection,
            **optional,
        )
        self.rope_scaling = rope_scaling
        self.core_attention.positions_of_layout = True
        self.core_attention.packed_cut = packed_cut

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **others: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of this rank's tokens to their documents.

        Args: as :meth:`lasp.megatron.RingSelfAttention.forward`.

        Returns:
            The output as ``hidden_states``, and the bias of the projection, None.
        """
        refuse_arguments("ring latent attention", **others)
        core, config = self.core_attention, self.config
        gathered = self.pg_collection.tp.size() if config.sequence_parallel else 1
        layout = core.layout_of(packed_seq_params, hidden_states.shape[0] * gathered)
        positions = layout.position_ids(core.cp_group.rank(), hidden_states.device)
        widths = (config.qk_head_dim, config.qk_pos_emb_head_dim)
        # [B, T, ...], or [T, ...] for a pack.
        q, c, shared = (
            x.squeeze(1) if packed_seq_params is not None else x.transpose(0, 1)
            for x in (self._queries(hidden_states), *self._latents(hidden_states))
        )
        how = (widths[1], config.rotary_base, self.rope_scaling, q.dtype)
        table = rotary_table(positions, *how)
        own, turning = q.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)
        q = torch.cat((own, _rotated(turning, table)), dim=-1)
        shared = _rotated(shared.unsqueeze(-2), table).squeeze(-2)
        weight = self.linear_kv_up_proj().unflatten(0, (q.shape[-2], -1))
        output = ring_latent_attention(
            q,
            torch.cat((c, shared), dim=-1),
            weight,
            layout=layout,
            cp_group=core.cp_group,
            causal=core.attn_mask_type == AttnMaskType.causal,
            window=core.window,
            sinks=core.softmax_offset,
            scale=self.softmax_scale,
        ).output.flatten(-2)
        output = output.unsqueeze(1) if packed_seq_params is not None else output.transpose(0, 1)
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(output.contiguous())
        return projected

    def _queries(self, hidden: Tensor) -> Tensor:
        """``[T, B, H / tp * D]``."""
        q: Tensor
        if self.config.q_lora_rank is None:
            q, _ = self.linear_q_proj(hidden)
        else:
            compressed = self._gathered(self.linear_q_down_proj(hidden)[0])
            if self.config.sequence_parallel:
                compressed = scatter_to_sequence_parallel_region(compressed, self.pg_collection.tp)
            q, _ = self.linear_q_up_proj(self.q_layernorm(compressed))
        return q

    def _latents(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Normed latents ``[T, B, R]`` and the part of keys that heads share, on every tp rank.

        Their gradients, one part from the heads of each rank, are summed over tp.
        """
        tp_group = self.pg_collection.tp
        widths = (self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim)
        c, shared = self._gathered(self.linear_kv_down_proj(hidden)[0]).split(widths, dim=-1)
        shared = _SumOfGradients.apply(shared, tp_group)  # type: ignore[no-untyped-call]
        if not self.config.sequence_parallel:  # tp is 1
            return self.kv_layernorm(c), shared
        # The norm's weight is marked as one of a part of the tokens.
        normed = self.kv_layernorm(scatter_to_sequence_parallel_region(c, tp_group))
        return gather_from_sequence_parallel_region(normed, group=tp_group), shared

    def _gathered(self, x: Tensor) -> Tensor:
        """All features of a projection that is cut over tp."""
        gathered: Tensor = gather_from_tensor_model_parallel_region(x, self.pg_collection.tp)
        return gathered


def _rotated(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """``[..., T, H, P]`` rotated; neighbours become halves, in queries and keys alike."""
    return rotated(x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2), *table)


def scaling_of(config: MLATransformerConfig) -> RopeScaling | None:
    """Scaling of the rotation by Megatron's options of latent attention.

    What scores have besides is in Megatron's ``softmax_scale``.
    """
    if config.rope_type == "rope":
        return None
    if config.rope_type != "yarn":
        raise ValueError(
            f"config.rope_type must be 'rope' or 'yarn' for ring latent attention, got"
            f" {config.rope_type!r}: choose one"
        )
    options = (config.rotary_scaling_factor, config.original_max_position_embeddings)
    scaling = RopeScaling("yarn", *options, config.beta_fast, config.beta_slow)
    magnitudes = [scaling.magnitude(m) for m in (config.mscale, config.mscale_all_dim)]
    return replace(
        scaling,
        attention_factor=magnitudes[0] / magnitudes[1],
        mscale_all_dim=config.mscale_all_dim,
    )


def ring_latent_attention_spec(*, packed_cut: PackedCut | None = None) -> ModuleSpec:
    """Spec of a ``self_attention`` for a layer with a MLATransformerConfig."""
    return ModuleSpec(
        module=RingLatentSelfAttention,
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ColumnParallelLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ColumnParallelLinear,
            linear_kv_up_proj=KVUpProjection,
            core_attention=RingCoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=ResidualNorm,
            kv_layernorm=ResidualNorm,
        ),
        params={"attn_mask_type": AttnMaskType.causal, "packed_cut": packed_cut},
    )
