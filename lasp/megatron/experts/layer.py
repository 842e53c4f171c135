"""The layer: MoELayer's six stages, and forward as their composition."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.megatron.checks import groups_of, parameter_device, refuse_arguments
from lasp.megatron.experts.call import Call
from lasp.megatron.experts.checkpoint import sharded_experts
from lasp.megatron.experts.config import (
    DEFAULT_OPTIONS,
    PART,
    ExpertOptions,
    check_groups,
    moe_config,
)
from lasp.megatron.experts.initial import draw_initial_values
from lasp.megatron.experts.loss import StepBalance, attach_aux_loss
from moe_parallel.dispatch import all_to_all as exchange
from moe_parallel.dispatch.permute import permute, row_order, unpermute
from moe_parallel.impl import chosen_impl
from moe_parallel.layer import ExpertParallelMoE
from moe_parallel.pipeline.pipeline import local_pipeline
from moe_parallel.router.host_counts import KeptCounts
from moe_parallel.router.route import Routing
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.topology import ExpertGroups

_GROUPS = ("tp", "cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_dp_cp")


class ExpertParallelMoELayer(MoELayer):
    """:class:`moe_parallel.ExpertParallelMoE` in the place of Megatron's MoELayer.

    The stages of MoELayer, which Megatron's 1F1B schedule calls one by one::

        probs, routing_map = route(hidden)          experts of every token, over all ranks
        tokens, probs = preprocess(hidden, probs, routing_map)      rows by expert
        tokens, probs = dispatch(tokens, probs)     all-to-all over EP
        output, _ = routed_experts_compute(tokens, probs)           over ETP: gather, scatter
        output = combine(output)                    all-to-all over EP
        output = postprocess(output, None)          weighted sum of each token's rows

    A call ends before the next one starts, gradients flow through the arguments alone, so that each
    may be detached between stages, and what a stage is given may be freed after it.

    Args:
        config: Megatron's, see :func:`moe_config`; ``moe_token_dispatcher_type`` ``alltoall`` and
            ``allgather`` both mean the exchange of this layer.
        submodules: not read: the parts of this layer are its own.
        layer_number: from 1, under which Megatron logs the auxiliary loss.
        pg_collection: its groups; of the parallel state if None. TransformerLayer of 0.16 and 0.17
            passes none to a subclass of MoELayer: with a collection of your own use
            ``lasp.megatron.HybridTransformerLayer``, which passes it in every version.
        init_gain: factor of the experts' initial values, which ``config.init_method`` and
            ``config.output_layer_init_method`` draw; DeepNorm's beta. They do not depend on the
            ranks.
        options: what Megatron's config has no options for.

    Gradients: the auxiliary loss (:class:`StepBalance` counts the micro-batches of a step) is added
    to the gradients as Megatron's own, scaled so that the sum over ranks is that of one loss over
    all tokens, averaged over micro-batches (weighted by their routed tokens with
    ``calculate_per_token_loss``).

    Raises:
        ValueError: for options that are not supported and missing groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: object = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        init_gain: float = 1.0,
        options: ExpertOptions = DEFAULT_OPTIONS,
        **_: object,
    ) -> None:
        moe = moe_config(config, options)
        self_groups = groups_of(pg_collection, PART, *_GROUPS)
        groups = ProcessGroupCollection(**dict(zip(_GROUPS, self_groups)))
        check_groups(moe, groups)
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
                several["tp_dp_cp"],
                several["ep"],
                several["expt_tp"],
                several["tp_ep"],
                options.peers,
            ),
            # Megatron seeds the CPU generator alike on the ranks of a stage.
            seed=int(torch.randint(2**31, ())),
            device=parameter_device(config),
            dtype=config.params_dtype,
        )
        self.moe.experts.saved_by_part = True  # see checkpoint.py
        draw_initial_values(self.moe, config, init_gain)
        # As Megatron's router: its optimizers save parameters of one dtype; route() computes wider.
        gate = self.moe.gate.weight
        gate.data = gate.data.to(config.params_dtype)
        gate.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        for parameter in self.moe.experts.parameters():
            # Reduced over the expert groups and stepped by an optimizer of their own, at any ep and
            # etp: a checkpoint of the optimizer then has one form.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # No rank's are duplicates of another tensor parallel rank's: all count in the norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.recompute = config.recompute_granularity == "selective" and (
            "moe" in config.recompute_modules
        )
        self.step_balance = StepBalance(moe.num_experts, parameter_device(config))
        self._call: Call | None = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's hook."""
        self.layer_number = layer_number

    def backward_dw(self, routed_experts: bool = True, shared_experts: bool = False) -> None:
        """Nothing is delayed: the weight gradients are part of the backward."""

    def forward(
        self,
        hidden_states: Tensor,
        intermediate_tensors: object = None,
        padding_mask: Tensor | None = None,
        *,
        token_order: TokenOrder | None = None,
    ) -> tuple[Tensor, None]:
        """The six stages, in the same bits; 2 to 5 by :mod:`moe_parallel.pipeline.pipeline`.

        Args:
            hidden_states: ``[T / tp, B, hidden]``, this rank's tokens.
            intermediate_tensors: must be None.
            padding_mask: must be None: padding is what ``token_order`` leaves out.
            token_order: see :class:`moe_parallel.TokenOrder`, over the tp x cp x dp ranks; None:
                every rank holds as many tokens, in rank order and that of the rows, none padding.

        Returns:
            As ``hidden_states``, and None for the bias.
        """
        refuse_arguments(PART, intermediate_tensors=intermediate_tensors)

        def compute(hidden: Tensor) -> Tensor:
            probs, routing_map = self.route(hidden, padding_mask, token_order=token_order)
            call = self._under_way()
            x_TM = call.order.take(hidden.flatten(0, 1), self.moe.mesh.token_rank)
            call.probs = probs
            output, call.rows = self.moe.through_experts(
                x_TM, routing_map, call.kept(routing_map), call.counts
            )
            return self.postprocess(output, None)

        if self.recompute:
            return tensor_parallel.checkpoint(compute, False, hidden_states), None
        return compute(hidden_states), None

    # ---- the stages --------------------------------------------------------------------------

    def route(
        self,
        hidden_states: Tensor,
        padding_mask: Tensor | None = None,
        *,
        token_order: TokenOrder | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Choose the experts of every token, over the tokens of all ranks.

        Args:
            hidden_states: as :meth:`forward`'s.
            padding_mask: must be None.
            token_order: as :meth:`forward`'s.

        Returns:
            For the T routed tokens by global position, best expert first: ``probs`` ``[T, k]``, in
            the dtype of the gate, and ``routing_map`` ``[T, k]`` int64, the expert. Of a dropped
            assignment they are 0 and -1.

        Communication: one all-gather over tp x cp x dp, see
        :func:`moe_parallel.router.route.route`.
        """
        refuse_arguments(PART, padding_mask=padding_mask)
        rows = hidden_states.flatten(0, 1)
        order = self.moe.agreed_order(rows, token_order)
        tokens = order.take(rows, self.moe.mesh.token_rank)
        routing: Routing = self.moe.gate(tokens, order)
        # New memory: arguments of stages are freed after them, and the softmax keeps its output.
        if routing.mask is None:
            probs, routing_map = routing.weights.clone(), routing.experts.clone()
        else:
            probs = routing.weights.masked_fill(~routing.mask, 0.0)
            routing_map = routing.experts.masked_fill(~routing.mask, -1)
        # Once of a layer that is recomputed: its first forward has no gradients.
        if self.training and torch.is_grad_enabled() and self.moe.config.aux_loss_coefficient:
            probs = attach_aux_loss(
                probs,
                self.step_balance(routing),
                config=self.config,
                groups=self.groups,
                num_tokens=order.num_tokens,
                layer_number=self.layer_number,
            )
        impl = chosen_impl(self.moe.config.impl, tokens.device, tokens.dtype)
        self._call = Call(order, hidden_states.shape, KeptCounts(routing, order), impl)
        return probs, routing_map

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows ``[A, hidden]`` of the kept assignments, by expert; ``probs`` are passed on."""
        call, mesh = self._under_way(), self.moe.mesh
        call.rows = row_order(
            routing_map,
            call.kept(routing_map),
            call.counts.of_rank(mesh.token_rank),
            self.moe.config.num_experts,
            histogram=call.counts.histogram,
        )
        x_TM = call.order.take(hidden_states.flatten(0, 1), mesh.token_rank)
        rows = permute(x_TM, call.rows, call.impl)
        call.plan = exchange.plan_exchange(call.counts.wait(), mesh)
        return rows, probs

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to their experts, see :mod:`moe_parallel.dispatch.all_to_all`; ``probs`` stay."""
        rows = exchange.dispatch(hidden_states, self._under_way().plan, self.moe.groups.ep)
        return rows, probs.clone()

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """The local experts' rows, over ETP, computed; None for the bias."""
        call, etp_group = self._under_way(), self.moe.groups.etp
        call.probs, plan = probs, call.plan
        rows = exchange.gather_etp(hidden_states, plan, etp_group)
        rows = exchange.group_by_expert(rows, plan)
        if rows is hidden_states:
            rows = rows.clone()  # the experts keep them, and hidden_states may be freed
        counts = plan.expert_rows
        rows = self.moe.experts(rows, local_pipeline(counts), num_rows=sum(counts))
        rows = exchange.scatter_etp(exchange.group_by_source(rows, plan), plan, etp_group)
        return rows, None

    def combine(self, output: Tensor) -> Tensor:
        """Rows back to the ranks of their tokens, see :mod:`moe_parallel.dispatch.all_to_all`."""
        return exchange.combine(output, self._under_way().plan, self.moe.groups.ep)

    def shared_experts_compute(self, hidden_states: Tensor) -> None:
        """Nothing: options for shared experts are refused."""

    def postprocess(self, output: Tensor, shared_expert_output: None) -> Tensor:
        """The weighted sum of each token's rows, shaped as the hidden states; ends the call."""
        refuse_arguments(PART, shared_expert_output=shared_expert_output)
        call, self._call = self._under_way(), None  # it keeps no graph alive
        tokens = unpermute(output, call.probs, call.rows, call.impl)
        return call.order.put(tokens, self.moe.mesh.token_rank).view(call.shape)

    def _under_way(self) -> Call:
        if self._call is None:
            raise ValueError(
                "route must be called before the other stages, got no call under way: call the"
                " stages in order, once each"
            )
        return self._call

    # ---- checkpoints -------------------------------------------------------------------------

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Under the keys and the shapes of MoELayer with SequentialMLP, at any EP and ETP."""
        return sharded_experts(self.moe, self.groups, prefix, tuple(sharded_offsets), metadata)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Drop the extra states, which hold nothing."""
        for name in [n for n in state_dict if n.startswith(prefix) and n.endswith("_extra_state")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


def expert_parallel_moe_spec(
    *, init_gain: float = 1.0, options: ExpertOptions = DEFAULT_OPTIONS
) -> ModuleSpec:
    """Spec of an ``mlp`` for ``TransformerLayerSubmodules``."""
    return ModuleSpec(ExpertParallelMoELayer, params={"init_gain": init_gain, "options": options})
