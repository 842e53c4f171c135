"""Experts over EP x ETP ranks under one router decision, as a Megatron-Core MoE layer.

    TransformerLayerSubmodules.mlp = expert_parallel_moe_spec()

The router, its capacity and its auxiliary loss see all tokens of a pipeline stage. Checkpoints have
the keys of Megatron's own MoELayer with SequentialMLP and load either way.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_object_for_checkpoint,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor, nn

from lasp.megatron import groups_of, parameter_device, require
from moe_parallel.layer import ExpertParallelMoE, MoEConfig
from moe_parallel.order import TokenOrder
from moe_parallel.route import DropPolicy
from moe_parallel.topology import ExpertGroups

_POLICIES: dict[str, DropPolicy] = {"position": "position", "probs": "probability"}
_GROUPS = ("tp", "cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_dp_cp")


def moe_config(config: TransformerConfig) -> MoEConfig:
    """What our layer computes, out of Megatron's options.

    Raises:
        ValueError: for options that our layer does not have.
    """
    part = "the expert-parallel MoE layer"
    require(config, part, gated_linear_unit=True, activation_func=nn.functional.silu)
    require(config, part, add_bias_linear=False, moe_z_loss_coeff=None, moe_input_jitter_eps=None)
    require(config, part, moe_router_score_function="softmax", moe_router_pre_softmax=False)
    require(config, part, moe_router_enable_expert_bias=False, moe_router_num_groups=None)
    require(config, part, moe_router_topk_scaling_factor=None, moe_latent_size=None)
    require(config, part, moe_shared_expert_intermediate_size=None, mtp_num_layers=None)
    require(config, part, moe_pad_expert_input_to_capacity=False, moe_apply_probs_on_input=False)
    require(config, part, moe_router_force_load_balancing=False, fp8=None, fp4=None)
    require(config, part, overlap_moe_expert_parallel_comm=False, cuda_graph_impl="none")
    require(config, part, activation_func_clamp_value=None, glu_linear_offset=0.0)
    require(config, part, moe_enable_routing_replay=False)
    coefficient, kind = config.moe_aux_loss_coeff, config.moe_router_load_balancing_type
    if kind == "none":
        coefficient = 0.0
    if isinstance(coefficient, list) or (coefficient and kind != "global_aux_loss"):
        raise ValueError(
            "config.moe_router_load_balancing_type must be 'global_aux_loss' or 'none', got"
            f" {kind!r}: the router balances all tokens of a micro-batch together"
        )
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        raise ValueError(
            "config.sequence_parallel must be True with tensor parallelism, got False: every rank"
            " passes tokens of its own to the experts"
        )
    return MoEConfig(
        hidden_size=config.hidden_size,
        ffn_size=config.moe_ffn_hidden_size or config.ffn_hidden_size,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        capacity_factor=config.moe_expert_capacity_factor,
        drop_policy=_POLICIES[config.moe_token_drop_policy],
        aux_loss_coefficient=coefficient,
    )


class ExpertParallelMoELayer(MoELayer):
    """:class:`moe_parallel.ExpertParallelMoE` in the place of Megatron's MoELayer.

    It is a MoELayer for Megatron's ``isinstance`` only: the stages of one, which its schedules
    call one by one, are replaced by one forward; the options that need them are refused.

    Args:
        config: Megatron's, see :func:`moe_config`; ``moe_token_dispatcher_type`` is not read.
        submodules: not read: the parts of this layer are its own.
        layer_number: not read.
        pg_collection: its groups; of the parallel state if None. TransformerLayer of 0.16 and 0.17
            passes none to a subclass of MoELayer: with a collection of your own use
            ``lasp.megatron_hybrid.HybridLayer``, which passes it in every version.
        init_gain: factor of the experts' initial standard deviation, which is Xavier's
            sqrt(2 / (fan in + fan out)); DeepNorm's beta. Values do not depend on the ranks.

    Gradients: the auxiliary loss is added to the gradients as Megatron's own, scaled so that the
    sum over ranks is that of one loss over all tokens, averaged over micro-batches (weighted by
    their routed tokens with ``calculate_per_token_loss``).

    Raises:
        ValueError: for options that are not supported and missing groups.
    """

    # Megatron's arguments of a MoELayer, then ours.
    def __init__(
        self,
        config: TransformerConfig,
        submodules: object = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        init_gain: float = 1.0,
        **_: object,
    ) -> None:
        moe = moe_config(config)
        self_groups = groups_of(pg_collection, "the expert-parallel MoE layer", *_GROUPS)
        groups = ProcessGroupCollection(**dict(zip(_GROUPS, self_groups)))
        # Not MoELayer.__init__: it would build a router, a dispatcher and experts of its own.
        BaseMoELayer.__init__(self, config, layer_number, groups)
        self.groups = groups
        several = {
            name: group if group.size() > 1 else None
            for name, group in vars(groups).items()
            if name in _GROUPS
        }
        self.moe = ExpertParallelMoE(
            moe,
            groups=ExpertGroups(
                several["tp_dp_cp"], several["ep"], several["expt_tp"], several["tp_ep"]
            ),
            # Megatron seeds the CPU generator alike on the ranks of a stage.
            seed=int(torch.randint(2**31, ())),
            device=parameter_device(config),
            dtype=config.params_dtype,
        )
        self.moe.experts.reset_parameters(int(torch.randint(2**31, ())), gain=init_gain)
        self.moe.gate_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        for parameter in self.moe.experts.parameters():
            # Reduced over the expert groups and stepped by an optimizer of their own, at any ep and
            # etp: a checkpoint of the optimizer then has one form.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # No rank's are duplicates of another tensor parallel rank's: all count in the norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.recompute = config.recompute_granularity == "selective" and (
            "moe" in config.recompute_modules
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's hook."""
        self.layer_number = layer_number

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: object = None,
        padding_mask: Tensor | None = None,
        *,
        token_order: TokenOrder | None = None,
    ) -> tuple[Tensor, None]:
        """Route, dispatch, compute, combine.

        Args:
            hidden_states: ``[T / tp, B, hidden]``, this rank's tokens.
            intermediate_tensors: must be None.
            padding_mask: must be None: padding is what ``token_order`` leaves out.
            token_order: see :class:`moe_parallel.TokenOrder`, over the tp x cp x dp ranks; None:
                every rank holds as many tokens, in rank order and that of the rows, none padding.

        Returns:
            As ``hidden_states``, and None for the bias.
        """
        if intermediate_tensors is not None or padding_mask is not None:
            raise ValueError(
                "intermediate_tensors and padding_mask must be None: describe padding by a"
                " PackedSequence with a token_order"
            )

        def compute(hidden: Tensor) -> Tensor:
            result = self.moe(hidden.flatten(0, 1), token_order=token_order)
            output: Tensor = result.output.view_as(hidden)
            if self.training and self.moe.config.aux_loss_coefficient:
                scale = self._aux_loss_scale(token_order, hidden)
                output = MoEAuxLossAutoScaler.apply(output, result.aux_loss * scale)
            return output

        if self.recompute:
            return tensor_parallel.checkpoint(compute, False, hidden_states), None
        return compute(hidden_states), None

    def _aux_loss_scale(self, token_order: TokenOrder | None, hidden: Tensor) -> int:
        """Undo what Megatron will divide gradients by, so that shares sum to one loss.

        Without ``calculate_per_token_loss`` its scaler and its DDP leave a factor 1 / dp; with it
        gradients are divided by the tokens of all ranks and micro-batches.
        """
        ranks = self.groups.tp_dp_cp.size()
        if self.config.calculate_per_token_loss:
            if token_order is not None:
                return token_order.num_tokens
            return int(ranks) * hidden.shape[0] * hidden.shape[1]
        dp: int = ranks // (self.groups.tp.size() * self.groups.cp.size())
        return dp

    # ---- checkpoints -------------------------------------------------------------------------

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Under the keys and the shapes of MoELayer with SequentialMLP, at any EP and ETP."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        if metadata.get("singleton_local_shards"):
            raise ValueError("singleton_local_shards must be off for the expert-parallel MoE layer")
        sharded = make_sharded_tensors_for_checkpoint(
            {"weight": self.moe.gate_weight},
            f"{prefix}router.",
            {},
            sharded_offsets,
            tp_group=self.groups.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        result = {f"{prefix}moe.gate_weight": sharded[f"{prefix}router.weight"]}
        for name, key in (("w13", "linear_fc1"), ("w2", "linear_fc2")):
            result[f"{prefix}moe.experts.{name}"] = self._expert_factory(
                name, f"{prefix}experts.experts.{key}.weight", tuple(sharded_offsets)
            )
            # Megatron's linear layers save an empty extra state each and ask for it when loading.
            for index in range(self.num_local_experts):
                result[f"{prefix}moe.experts.{name}.{index}._extra_state"] = (
                    make_sharded_object_for_checkpoint(
                        None,
                        f"{prefix}experts.experts.{key}._extra_state",
                        (*sharded_offsets, self._expert_offset(len(sharded_offsets), index)),
                        replica_id=(0, self.groups.expt_tp.rank(), self.groups.expt_dp.rank()),
                    )
                )
        return result

    def _expert_offset(self, axis: int, index: int) -> tuple[int, int, int]:
        """Where a local expert is along the axis of all experts."""
        first = self.groups.ep.rank() * self.num_local_experts
        return axis, first + index, self.moe.config.num_experts

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Drop the extra states, which hold nothing."""
        for name in [n for n in state_dict if n.startswith(prefix) and n.endswith("_extra_state")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _expert_factory(self, name: str, key: str, offsets: tuple[Any, ...]) -> Any:
        """Pieces of ``w13`` or ``w2`` in the whole ``[E, 2 F, hidden]`` or ``[E, hidden, F]``.

        Megatron has the gates of all ETP ranks before their ups, along the same dim.
        """
        etp, axes = self.groups.expt_tp, len(offsets)

        def build(key: str, data: Tensor, replica_id: Any, flattened_range: Any) -> list[Any]:
            pieces = []
            for index in range(self.num_local_experts):
                expert = self._expert_offset(axes, index)
                if name == "w13":
                    cuts = [
                        (
                            data[index, half],
                            (axes + 1, half * etp.size() + etp.rank(), 2 * etp.size()),
                        )
                        for half in (0, 1)
                    ]
                else:
                    cuts = [(data[index], (axes + 2, etp.rank(), etp.size()))]
                pieces += [
                    ShardedTensor.from_rank_offsets(
                        key,
                        part,
                        *offsets,
                        expert,
                        cut,
                        replica_id=replica_id,
                        prepend_axis_num=axes + 1,
                    )
                    for part, cut in cuts
                ]
            return pieces

        weight = getattr(self.moe.experts, name)

        def merge(pieces: list[Tensor]) -> Tensor:
            return torch.stack(pieces).view(weight.shape)

        replica_id = (0, 0, self.groups.expt_dp.rank())
        return ShardedTensorFactory(key, weight, build, merge, replica_id)


def expert_parallel_moe_spec(*, init_gain: float = 1.0) -> ModuleSpec:
    """Spec of an ``mlp`` for ``TransformerLayerSubmodules``."""
    return ModuleSpec(module=ExpertParallelMoELayer, params={"init_gain": init_gain})


__all__ = ["ExpertParallelMoELayer", "expert_parallel_moe_spec", "moe_config"]
