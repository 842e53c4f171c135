"""The decoder layer with residuals of its own that both forms of a hybrid model are made of."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from lasp.hybrid.config import Residuals, ResidualScale
from lasp.megatron.activations import KeptActivations
from lasp.megatron.checks import groups_of, refuse_arguments
from lasp.megatron.experts.layer import ExpertParallelMoELayer
from lasp.megatron.hybrid_options import PART, check_layers
from lasp.megatron.packing import token_order_of
from lasp.megatron.packs import PackedCut


class ScaledLayer(TransformerLayer):
    """Attention and an MLP, or one of the two, around weighted residuals.

    ``post``: ``h = norm(x); y = alpha h + beta attention(h); g = norm(y); alpha g + beta mlp(g)``.
    ``pre``: the same with x and y for the residuals h and g. A part that is missing has
    neither norm nor residual.

    The MoE layer gets the process groups of this layer in every Megatron version, and the token
    order of a :class:`lasp.megatron.PackedSequence`.

    Args:
        config: Megatron's.
        submodules: the parts; IdentityOp is none.
        layer_number: as TransformerLayer's.
        pg_collection: process groups; of the parallel state if None.
        residuals: see :class:`lasp.hybrid.Residuals`.
        is_softmax: whether the attention, if there is one, is softmax attention.
        packed_cut: how Megatron's own packs are cut, see :data:`lasp.megatron.PackedCut`.
        activations: what is kept for the backward, see ``lasp.megatron.activations``.
        optional: what a Megatron version passes besides.

    Raises:
        ValueError: for options that are not supported, of this layer or its parts.
    """

    # Megatron's arguments of a layer, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        residuals: Residuals,
        is_softmax: bool = False,
        packed_cut: PackedCut | None = None,
        activations: str = "none",
        **optional: Any,
    ) -> None:
        check_layers(config)
        kept = KeptActivations(config, activations)
        groups_of(pg_collection, PART, "pp", "tp", "cp")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        parts = copy(submodules)
        module = getattr(submodules.mlp, "module", None)
        with_experts = isinstance(module, type) and issubclass(module, ExpertParallelMoELayer)
        if with_experts:
            # Built below: TransformerLayer of 0.16 gives groups to Megatron's own MoELayer only.
            parts.mlp = IdentityOp
        super().__init__(config, parts, layer_number, pg_collection=pg_collection, **optional)
        if with_experts:
            self.mlp = build_module(submodules.mlp, config=config, pg_collection=pg_collection)
            # From 0.18 on Megatron counts layers of multi-token prediction apart; its log does not.
            before = config.num_layers if optional.get("is_mtp_layer") else 0
            self.mlp.set_layer_number(before + self.layer_number)
            self.is_moe_layer = True
        self.post_norm = residuals.norm == "post"
        self.attention_scale = residuals.softmax if is_softmax else residuals.lightning
        self.mlp_scale = residuals.mlp
        self.packed_cut = packed_cut
        self.kept = kept

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        *,
        attention_bias: Tensor | None = None,
        inference_context: object = None,
        packed_seq_params: Any = None,
        **others: object,
    ) -> tuple[Tensor, None]:
        """One layer over this rank's tokens ``[T, B, hidden]``; no context comes back."""
        refuse_arguments(PART, context=context, **others)
        if not isinstance(self.self_attention, IdentityOp):
            attend = partial(
                self._through_attention,
                attention_mask=attention_mask,
                attention_bias=attention_bias,
                inference_context=inference_context,
                packed_seq_params=packed_seq_params,
            )
            hidden_states = self.kept.through_attention(attend, self.self_attention, hidden_states)
        if not isinstance(self.mlp, IdentityOp):
            half = partial(self._through_mlp, packed_seq_params=packed_seq_params)
            hidden_states = self.kept.through_mlp(half, hidden_states)
        return hidden_states, None

    def _through_attention(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        mixed = self.self_attention(normed, **arguments)
        residual = normed if self.post_norm else hidden_states
        return _add(residual, mixed, self.attention_scale)

    def _through_mlp(self, hidden_states: Tensor, *, packed_seq_params: Any) -> Tensor:
        normed, options = self.pre_mlp_layernorm(hidden_states), {}
        if isinstance(self.mlp, ExpertParallelMoELayer):
            options["token_order"] = token_order_of(
                packed_seq_params, len(normed), self.packed_cut, self.mlp.groups
            )
        residual = normed if self.post_norm else hidden_states
        return _add(residual, self.mlp(normed, **options), self.mlp_scale)


def _add(residual: Tensor, part: tuple[Tensor, Tensor | None], scale: ResidualScale) -> Tensor:
    output, bias = part
    if bias is not None:
        output = output + bias
    return scale.add(residual, output)
