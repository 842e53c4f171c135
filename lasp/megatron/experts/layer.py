"""The layer in the place of Megatron's MoELayer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from lasp.megatron.checks import groups_of, parameter_device, refuse_arguments
from lasp.megatron.experts.checkpoint import sharded_experts
from lasp.megatron.experts.config import (
    DEFAULT_OPTIONS,
    PART,
    ExpertOptions,
    check_groups,
    moe_config,
)
from lasp.megatron.experts.loss import LayerLosses, StepBalance, attach_losses
from lasp.megatron.experts.router import order_of_mask, sequences_of
from moe_parallel.experts.shard import generator_of
from moe_parallel.layer import ExpertParallelMoE
from moe_parallel.router.counts import Routing
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.topology import ExpertGroups

_GROUPS = ("tp", "cp", "ep", "expt_tp", "expt_dp", "tp_ep", "tp_dp_cp")


class ExpertParallelMoELayer(MoELayer):
    """:class:`moe_parallel.ExpertParallelMoE` in the place of Megatron's MoELayer.

    It routes, exchanges and computes in one call. Megatron's 1F1B overlap schedule, which calls the
    stages of MoELayer one by one, is refused (``config.overlap_moe_expert_parallel_comm``): the
    layer overlaps its own communication.

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
            ),
            symmetric_memory=options.symmetric_memory,
            # Megatron seeds the CPU generator alike on the ranks of a stage.
            seed=int(torch.randint(2**31, ())),
            device=parameter_device(config),
            dtype=config.params_dtype,
        )
        self.moe.experts.saved_by_part = True  # see checkpoint.py
        _draw_initial_values(self.moe, config, init_gain)
        # As Megatron's router: its optimizers save parameters of one dtype; route() computes wider.
        gate = self.moe.gate.weight
        gate.data = gate.data.to(config.params_dtype)
        for parameter in (gate, *(self.moe.shared.parameters() if self.moe.shared else ())):
            parameter.sequence_parallel = config.sequence_parallel
        for parameter in self.moe.experts.parameters():
            # Reduced over the expert groups and stepped by an optimizer of their own, at any ep and
            # etp: a checkpoint of the optimizer then has one form.
            parameter.allreduce = False  # type: ignore[attr-defined]
            # No rank's are duplicates of another tensor parallel rank's: all count in the norm.
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.recompute = config.recompute_granularity == "selective" and (
            "moe" in config.recompute_modules
        )
        self._orders: dict[int, TokenOrder] = {}  # by rows of a rank
        self._needs_order = moe.pad_to_capacity or moe.static_shapes
        self.step_balance = StepBalance(moe.num_experts, parameter_device(config))

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
        """Route, dispatch, compute and combine.

        Args:
            hidden_states: ``[T / tp, B, hidden]``, this rank's tokens.
            intermediate_tensors: must be None.
            padding_mask: ``[B, T / tp]``, True for padding, which is neither routed nor counted,
                and whose output is zero. The layers of a model must get one tensor: the first has
                the ranks gather it, and the host wait.
            token_order: see :class:`moe_parallel.TokenOrder`, over the tp x cp x dp ranks; None:
                every rank holds as many tokens, in rank order and that of the rows, none padding
                but by the mask.

        Returns:
            As ``hidden_states``, and None for the bias.
        """
        refuse_arguments(PART, intermediate_tensors=intermediate_tensors)
        if padding_mask is not None:
            if token_order is not None:
                raise ValueError(
                    f"padding_mask must be None for {PART} with a token_order, got both: the order"
                    " leaves padding out"
                )
            token_order = order_of_mask(padding_mask, self.groups)
        elif token_order is None and self._needs_order:
            token_order = self._order_of_rows(hidden_states.shape[0] * hidden_states.shape[1])

        def compute(hidden: Tensor) -> Tensor:
            rows = hidden.flatten(0, 1)
            self.moe.check_first_call(rows, token_order, None)
            order, rank = self.moe.agreed_order(rows, token_order), self.moe.mesh.token_rank
            tokens = order.take(rows, rank)
            sequences = None
            if self.moe.config.router.sequence_loss_coefficient:
                sequences = sequences_of(hidden, self.config, self.groups, order)
            routing = self._with_losses(self.moe.gate(tokens, order, sequences=sequences))
            output, _ = self.moe.through_experts(tokens, routing, order)
            return order.put(output, rank).view(hidden.shape)

        if self.recompute:
            return tensor_parallel.checkpoint(compute, False, hidden_states), None
        return compute(hidden_states), None

    def _order_of_rows(self, num_rows: int) -> TokenOrder:
        """So many tokens on every rank, none of them padding; one object for all calls."""
        if num_rows not in self._orders:
            ranks = self.groups.tp_dp_cp.size()
            self._orders[num_rows] = TokenOrder.contiguous([num_rows] * ranks)
        return self._orders[num_rows]

    def _with_losses(self, routing: Routing) -> Routing:
        """The routing, with whose weights' gradients those of the router's losses come."""
        coefficient = self.moe.config.aux_loss_coefficient
        has_losses = coefficient or self.moe.config.router.has_losses
        # A layer that is recomputed counts once: its first forward has no gradients.
        if not (self.training and torch.is_grad_enabled() and has_losses):
            return routing
        balance = self.step_balance(routing) if coefficient else None
        layer = LayerLosses(self.config, self.groups, self.layer_number)
        return routing._replace(weights=attach_losses(routing, balance, layer))

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


@torch.no_grad()
def _draw_initial_values(moe: ExpertParallelMoE, config: TransformerConfig, gain: float) -> None:
    """Fill the router and every expert by Megatron's init methods; they do not depend on the mesh.

    ``config.init_method`` draws the weight of the router and, of every expert, the gate and the up
    projection; ``config.output_layer_init_method`` draws the down projection. Each of them
    fills a whole matrix in float32 on the CPU.

    Without ``config.perform_initialization`` nothing is drawn. The experts' are scaled by ``gain``.
    """
    if not config.perform_initialization:
        return
    # Megatron seeds the CPU generator alike on the ranks of a stage.
    for_experts, for_gate = (int(torch.randint(2**31, ())) for _ in range(2))

    def draw(name: str, whole: Tensor, generator: torch.Generator) -> None:
        if name == "w13":
            for projection in whole:
                _apply(config.init_method, projection, generator)
        else:
            _apply(config.output_layer_init_method, whole, generator)
        whole.mul_(gain)

    moe.experts.fill(for_experts, draw)
    gate = torch.empty(moe.gate.weight.shape, device="cpu", dtype=torch.float32)
    _apply(config.init_method, gate, generator_of(for_gate))
    moe.gate.weight.copy_(gate)
    if moe.shared is None:
        return
    generator = generator_of(int(torch.randint(2**31, ())))
    for name, weight in moe.shared.named_parameters():
        whole = torch.empty(weight.shape, device="cpu", dtype=torch.float32)
        if name == "gate":
            _apply(config.init_method, whole, generator)
        else:
            draw(name, whole, generator)
        weight.copy_(whole)


def _apply(init_method: Callable[[Tensor], Any], x: Tensor, generator: torch.Generator) -> None:
    """An init method takes no generator: it draws from torch's own, which is as before after it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))
        )
        init_method(x)
