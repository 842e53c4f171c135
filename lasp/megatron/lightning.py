"""Lightning attention as the self-attention of a Megatron layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp._core.impl import Impl, check_impl
from lasp.layers.options import MINIMAX_OPTIONS, LightningOptions
from lasp.layers.parts import heads_of
from lasp.lightning.attention import lightning_attention
from lasp.lightning.decay import Variant, decay_rates
from lasp.lightning.validation import check_exchange
from lasp.megatron.batch import layout_of, order_of_rows
from lasp.megatron.checks import check_heads, groups_of, refuse_arguments, require
from lasp.megatron.norm import HeadsNorm, OneHeadNorm
from lasp.megatron.packs import PackedCut, check_packed_cut
from lasp.sequence.layout import SequenceLayout
from lasp.state_exchange import Exchange

# Sizes of Megatron's own linear attentions, by their defaults: heads here are num_attention_heads
# of kv_channels, and there is no convolution.
_OTHER_MIXERS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}


@dataclass
class LightningSelfAttentionSubmodules:
    """Parts of :class:`LightningSelfAttention`.

    Attributes:
        in_proj: column parallel, hidden to (q, k, v, gate) of every head, head by head.
        out_proj: row parallel, the heads back to hidden.
    """

    in_proj: Any = ColumnParallelLinear
    out_proj: Any = RowParallelLinear


class LightningSelfAttention(MegatronModule):
    """The token mixer of :class:`lasp.LightningAttention` over tensor-parallel ranks.

    Head by head, ``q, k, v, g = split(W_in x)``; ``o = lightning_attention(silu(q), silu(k),
    silu(v))`` with scale 1; ``y = W_out (RMSNorm(o) * sigmoid(g))``, or what other ``options`` say.
    It has no mask and no biases: the arguments for them are ignored. ``W_in`` is laid out ``[H, 4,
    head_dim]``, so that a tensor-parallel slice is a range of heads, in a checkpoint too.

    Args:
        config: Megatron's; ``num_attention_heads``, ``kv_channels`` and ``num_layers`` count.
            ``multi_latent_attention`` and ``attention_output_gate`` are of softmax layers.
        submodules: the projections.
        layer_number: from 1, over all pipeline stages, as TransformerLayer passes it.
        attn_mask_type: not read, lightning attention is causal.
        pg_collection: its tp and cp groups; of the parallel state if None.
        decay: formula of the decay rates, see ``lasp.lightning.decay``, or those of all heads,
            ``[num_attention_heads]``, or of all layers that ``decay_layers`` counts besides.
        options: what is computed around the attention. They need a gate and no bias; groups of the
            output norm are whole on a tensor-parallel rank.
        decay_layers: numbers of the layers that the decay formula counts; None: all. A HybridModel
            numbers MLPs too.
        num_decay_layers: layers that the formula counts, where the model is the first part of a
            deeper one; None: as many as ``decay_layers``.
        impl: who computes, see :func:`lasp.lightning_attention`: ``triton`` has kernels for the
            activation, the norm and the gate too, see ``lasp.layers.norm_gate``.
        exchange: how states cross the context-parallel ranks, see ``lasp.state_exchange``.
        packed_cut: how Megatron's own packs are cut, see :data:`lasp.megatron.PackedCut`.

    Communication: Megatron's of two linear layers, that of :func:`lasp.lightning_attention` over
    cp, that of :class:`HeadsNorm` over tp.

    Raises:
        ValueError: for heads that tp does not divide, names and options that are not supported.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LightningSelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: object = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        decay: Variant | Tensor = "minimax",
        options: LightningOptions = MINIMAX_OPTIONS,
        decay_layers: Sequence[int] | None = None,
        num_decay_layers: int | None = None,
        impl: Impl = "auto",
        exchange: Exchange = "auto",
        packed_cut: PackedCut | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        part = "lightning attention"
        self.order, self.packed_cut = order_of_rows(config, part), packed_cut
        check_packed_cut(packed_cut)
        check_impl(impl)
        check_exchange(exchange)
        self.tp_group, self.cp_group = groups_of(pg_collection, part, "tp", "cp")
        self.head_dim, self.impl, self.exchange = config.kv_channels, impl, exchange
        _check(config, part, options, self.tp_group.size())
        if decay_layers is None:  # else the layer of multi-token prediction is another one
            require(config, part, mtp_num_layers=None)
        self.options = options
        self.scale = options.scale_of(self.head_dim)
        inner = config.num_attention_heads * self.head_dim
        linear = {"config": config, "bias": False, "skip_bias_add": True, "is_expert": False}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            4 * inner,
            init_method=config.init_method,
            gather_output=False,
            tp_comm_buffer_name="qkvg",
            tp_group=self.tp_group,
            **linear,
        )
        if options.qk_norm:
            self.q_norm, self.k_norm = (
                OneHeadNorm(config, eps=options.norm_eps, tp_group=self.tp_group) for _ in "qk"
            )
        self.out_norm = HeadsNorm(config, inner, options=options, tp_group=self.tp_group)
        self.out_proj = build_module(
            submodules.out_proj,
            inner,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
            **linear,
        )
        counted = range(1, config.num_layers + 1) if decay_layers is None else decay_layers
        self.rates = self._rates(counted, num_decay_layers or len(counted), layer_number, decay)

    def _rates(
        self, counted: Sequence[int], num_layers: int, layer_number: int, decay: Variant | Tensor
    ) -> Tensor:
        """This rank's decay rates, float32 on the CPU, whatever the module is cast or moved to."""
        if layer_number not in counted:
            raise ValueError(
                f"layer_number must be one of decay_layers {list(counted)}, got {layer_number}:"
                " list every attention layer of the model"
            )
        index = counted.index(layer_number)
        if isinstance(decay, Tensor) and decay.dim() == 2 and len(decay) == len(counted):
            decay = decay[index]
        return decay_rates(
            self.config.num_attention_heads,
            index,
            num_layers,
            decay,
            tp_rank=self.tp_group.rank(),
            tp_size=self.tp_group.size(),
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: object = None,
        packed_seq_params: PackedSeqParams | None = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """Mix the tokens of each document.

        Args:
            hidden_states: ``[T / tp if sequence parallel else T, B, hidden]``, B is 1 for packs.
            attention_mask: not read.
            rotary_pos_emb: not read.
            packed_seq_params: see :func:`layout_of`.
            others: of cross attention, biases and inference; must be None.

        Returns:
            As ``hidden_states``, and None for the bias.
        """
        refuse_arguments("lightning attention", **others)
        gathered = self.tp_group.size() if self.config.sequence_parallel else 1
        shape = (len(hidden_states) * gathered, self.cp_group.size())
        layout = layout_of(packed_seq_params, *shape, self.order, self.packed_cut)
        mixed, _bias = self.in_proj(hidden_states)
        packed = packed_seq_params is not None
        mixed = mixed.squeeze(1) if packed else mixed.transpose(0, 1)
        qkv, gate = mixed.unflatten(-1, (-1, 4 * self.head_dim)).split(
            (3 * self.head_dim, self.head_dim), dim=-1
        )
        q, k, v = self._heads(qkv, layout)
        output = lightning_attention(
            q,
            k,
            v,
            self.rates,
            layout=layout,
            cp_group=self.cp_group,
            scale=self.scale,
            exchange=self.exchange,
            impl=self.impl,
            output_final_state=False,
        ).output
        gated = self.out_norm(output.flatten(-2), gate.flatten(-2), impl=self.impl)
        projected: Tensor
        projected, _bias = self.out_proj(gated.unsqueeze(1) if packed else gated.transpose(0, 1))
        return projected, None

    def _heads(self, qkv: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of this rank's heads."""
        return heads_of(
            qkv,
            self.options,
            (self.q_norm, self.k_norm) if self.options.qk_norm else None,
            layout=layout,
            cp_group=self.cp_group,
            position_ids=None,
            impl=self.impl,
        )

    def backward_dw(self) -> None:
        """Nothing is delayed: the weight gradients are part of the backward."""


def _check(config: TransformerConfig, part: str, options: LightningOptions, tp_size: int) -> None:
    """Raise ValueError, naming it, for what of Megatron's config or the options is not here."""
    require(config, part, attention_dropout=0.0, qk_clip=False)
    require(config, part, fine_grained_activation_offloading=False)
    require(config, part, add_bias_linear=False, add_qkv_bias=False, **_OTHER_MIXERS)
    heads = config.num_attention_heads
    check_heads(heads, tp_size)
    options.check_heads(heads, config.kv_channels, tp_size)
    for name in ("qkv_bias", "gate_bias", "out_bias"):
        if getattr(options, name):
            raise ValueError(
                f"options.{name} must be False for lightning attention in Megatron, got True: its"
                " projections have no biases; lasp.LightningAttention has them"
            )
    if options.gate == "none":
        raise ValueError(
            "options.gate must be 'sigmoid' or 'silu' for lightning attention in Megatron, got"
            " 'none': in_proj has the rows of a gate; lasp.LightningAttention goes without"
        )


def lightning_attention_spec(
    *,
    decay: Variant | Tensor = "minimax",
    options: LightningOptions = MINIMAX_OPTIONS,
    decay_layers: Sequence[int] | None = None,
    num_decay_layers: int | None = None,
    impl: Impl = "auto",
    exchange: Exchange = "auto",
    packed_cut: PackedCut | None = None,
) -> ModuleSpec:
    """Spec of a ``self_attention`` for ``TransformerLayerSubmodules``."""
    return ModuleSpec(
        module=LightningSelfAttention,
        submodules=LightningSelfAttentionSubmodules(),
        params={
            "decay": decay,
            "options": options,
            "decay_layers": decay_layers,
            "num_decay_layers": num_decay_layers,
            "impl": impl,
            "exchange": exchange,
            "packed_cut": packed_cut,
        },
    )
