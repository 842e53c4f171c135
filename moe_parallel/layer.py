"""The mixture-of-experts layer over EP x ETP ranks: router, exchange, experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lasp._core.autocast import autocast_inputs
from lasp._core.checks import check_part
from lasp._core.consistency import check_same_calls
from lasp._core.derivatives import Reference, refuse_transforms
from lasp._core.graphs import outside_graphs
from lasp._core.impl import chosen_impl
from moe_parallel.config import MoEConfig
from moe_parallel.dispatch import SymmetricMemory, make_dispatcher
from moe_parallel.dispatch.padding import padded_rows
from moe_parallel.dispatch.permute import permute, unpermute
from moe_parallel.dispatch.plan import checked_rows
from moe_parallel.dispatch.sending import may_send_tokens, start_tokens, tokens_pay
from moe_parallel.dispatch.static_rows import MostRows, memory_rows
from moe_parallel.experts.dense import DenseFFN
from moe_parallel.experts.experts import Experts
from moe_parallel.experts.shard import generator_of
from moe_parallel.mesh import expert_mesh
from moe_parallel.pipeline.pipeline import Pipeline, call_groups, kept_rows
from moe_parallel.pipeline.timeline import Timeline
from moe_parallel.router.checks import agreed_order, check_hidden, routed_inputs, shared_settings
from moe_parallel.router.counts import Routing, RoutingStats
from moe_parallel.router.losses import TokenSequences
from moe_parallel.router.route import Router
from moe_parallel.router.scores import RoutingReplay
from moe_parallel.router.token_order import TokenOrder
from moe_parallel.sharding import check_replicas
from moe_parallel.topology import ExpertGroups

_REFERENCE = Reference("ExpertParallelMoE", "moe_parallel.reference.reference_moe")


class MoEOutput(NamedTuple):
    """Result of :class:`ExpertParallelMoE`.

    Attributes:
        output: the shape and dtype of the input, or autocast's dtype; zero for padding, and
            without a shared expert for tokens whose assignments were all dropped.
        aux_loss: this rank's share of the router's losses, a float32 (float64) scalar. Add it to
            this rank's loss: the shares sum to the loss of the whole batch.
        stats: assigned and dropped tokens of every expert over all ranks, on the device.
    """

    output: Tensor
    aux_loss: Tensor
    stats: RoutingStats


class ExpertParallelMoE(nn.Module):
    """Top-k mixture of SwiGLU experts (MiniMax-01 equation 1), split over EP x ETP ranks.

    h_t = sum over the kept experts e of token t of softmax(top-k logits)_e FFN_e(x_t). Other
    scores, biases, groups and losses: :class:`moe_parallel.RouterConfig`. Every rank passes tokens
    of its own; which experts they meet, and who is dropped, does not depend on how the batch is
    split over ranks. Like dropout, capacity is a rule of training: after ``eval()`` nothing is
    dropped, and no token takes the place of another.

    Parameters: ``gate.weight`` ``[E, hidden]``, the same on every rank, float32 (float64 in a
    float64 layer) whatever ``dtype`` is, as MiniMax keeps it; choose the dtype here rather than by
    ``.to(dtype)``, which would round the gate too. ``experts.w13`` and ``experts.w2`` hold this
    rank's part (:meth:`moe_parallel.experts.experts.Experts.sharding`), ``shared.*`` one whole.

    Args:
        config: sizes and policies.
        groups: process groups, :attr:`moe_parallel.topology.ParallelGroups.experts` or your own;
            the default is one rank.
        symmetric_memory: memory of the EP x ETP block, through which rows travel by copy engines;
            None: by all-to-all.
        seed: seed of the initial values, which do not depend on the mesh; give every layer another.
        device: device of the parameters; ``meta`` makes no values.
        dtype: dtype of the experts and the tokens.

    Gradients: parameter gradients are this rank's. If the loss is the sum of the ranks' losses (a
    mean must divide by the global token count), the caller sums ``experts.*`` over the EDP group,
    ``gate.weight`` and ``shared.*`` over the token group. Run backward on every rank, also one
    without tokens. Differentiating gradients again raises RuntimeError.

    Communication, per call: one all-gather over the token group (:mod:`moe_parallel.router.route`);
    two all-to-alls over EP and two over ETP for each of ``overlap_groups`` groups of experts, under
    the products of another (:mod:`moe_parallel.pipeline.pipeline`), or in all two over EP of tokens
    that cross once (:mod:`moe_parallel.dispatch.tokens`), twice that with backward; with
    ``symmetric_memory`` copies of as many bytes (:mod:`moe_parallel.dispatch.copy_engine`). One
    device-to-host copy of ranks x E counts, none with ``pad_to_capacity`` or ``static_shapes``. The
    first call compares how ranks call the layer, and the order (:mod:`moe_parallel.router.checks`).

    Raises:
        ValueError: naming the argument, on every rank and before any collective, if the sizes do
            not divide over the groups or the groups do not fit together.
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        groups: ExpertGroups = ExpertGroups(),  # noqa: B008 (immutable)
        symmetric_memory: SymmetricMemory | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_part("config", config, MoEConfig)
        where: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        self.config, self.groups, self.mesh = config, groups, expert_mesh(groups)
        self.dispatcher = make_dispatcher(self.mesh, groups, symmetric_memory)
        self._is_split = len(self.mesh.sources) > 1
        self._has_sequences = config.router.sequence_loss_coefficient > 0
        num_ranks = self.mesh.ep_size if may_send_tokens(config, self.mesh) else 0
        self.gate = Router(config, groups.token, num_ranks, **where)
        self.experts = Experts(
            config.hidden_size,
            config.ffn_size,
            config.num_experts,
            ep_rank=self.mesh.ep_rank,
            ep_size=self.mesh.ep_size,
            etp_rank=self.mesh.etp_rank,
            etp_size=self.mesh.etp_size,
            gemm=config.gemm,
            impl=config.impl,
            **where,
        )
        self.shared: DenseFFN | None = None
        if config.shared_ffn_size is not None:
            sizes, how = (config.hidden_size, config.shared_ffn_size), config.shared_gate
            self.shared = DenseFFN(*sizes, how, config.impl, **where)
        if (config.overlap_groups or 1) > self.experts.num_local:
            raise ValueError(
                f"overlap_groups must be at most the {self.experts.num_local} experts of a rank,"
                f" got {config.overlap_groups}: None lets the dispatcher choose"
            )
        self._calls_compared, self.most_rows = False, MostRows()
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int, *, gain: float = 1.0) -> None:
        """Xavier normal values that depend on the seed alone, not on the mesh.

        Args:
            seed: the same on every rank; give every layer another.
            gain: factor of the experts' standard deviation (DeepNorm's beta); not of the gate's.
        """
        # A seed each: from the same start, the gate would be rows of whatever else the seed draws.
        for_gate, for_experts, for_shared = torch.randint(
            2**63 - 1, (3,), generator=generator_of(seed), device="cpu"
        ).tolist()
        self.experts.reset_parameters(for_experts, gain=gain)
        self.gate.reset_parameters(generator_of(for_gate))
        if self.shared is not None:
            self.shared.reset_parameters(generator_of(for_shared), gain=gain)

    @outside_graphs
    def forward(
        self,
        hidden: Tensor,
        *,
        token_order: TokenOrder | None = None,
        timeline: Timeline | None = None,
        replay: RoutingReplay | None = None,
        sequences: TokenSequences | None = None,
    ) -> MoEOutput:
        """Route, dispatch, compute, combine.

        Args:
            hidden: ``[T, hidden]`` or ``[B, T, hidden]``, in the layer's dtype; any under autocast.
            token_order: where the tokens of every rank stand, one segment list for each rank of
                the token group, equal on all of them; tokens it leaves out are padding. None, on
                all ranks or on none: every rank holds as many tokens as this one, in rank order.
            timeline: records what ran when, forward and backward; None costs nothing.
            replay: keeps the choice of its first call, and has every later call make it again.
            sequences: which tokens form a sequence, with a ``sequence_loss_coefficient``. None on
                one rank with ``[B, T, hidden]``: every row of the batch is one.

        Raises:
            ValueError: naming the argument, if it does not fit the layer; on every rank alike, if
                the first call differs in dtype, config, sequences or whether there is an order, if
                ranks hold different orders or numbers of tokens, and if with a capacity some do not
                train (:func:`moe_parallel.router.checks.check_order`).
        """
        refuse_transforms(_REFERENCE, hidden)
        (hidden,) = autocast_inputs(hidden)
        self.check_first_call(hidden, token_order, sequences)
        check_hidden(hidden, self.experts.w13)
        if self._is_split:
            check_replicas(self.experts)
        rows = hidden if hidden.dim() == 2 else hidden.reshape(-1, self.config.hidden_size)
        token_order = self.agreed_order(rows, token_order)
        x_TM, given = token_order.take(rows, self.mesh.token_rank), {}
        if replay is not None or sequences is not None or self._has_sequences:
            given = routed_inputs(hidden, replay, sequences, self.config, token_order, self.mesh)
        decided = (x_TM, self.gate(x_TM, token_order, **given), token_order)
        output_TM, routing = self.through_experts(*decided, timeline=timeline, with_loss=True)
        output = token_order.put(output_TM, self.mesh.token_rank)
        output = output if hidden.dim() == 2 else output.view_as(hidden)
        return MoEOutput(output, routing.aux_loss, routing.stats)

    def check_first_call(
        self, hidden: Tensor, token_order: TokenOrder | None, sequences: TokenSequences | None
    ) -> None:
        """Raise ValueError on every rank alike, in the first call, unless all ranks call alike.

        Communication: :func:`lasp._core.consistency.check_same_calls`, once.
        """
        if not self._calls_compared:
            how = shared_settings(self.config, hidden, token_order, sequences)
            who = ("ExpertParallelMoE", self.groups.token)
            self._calls_compared = check_same_calls(*who, hidden, how)

    def agreed_order(self, rows: Tensor, token_order: TokenOrder | None) -> TokenOrder:
        """See :func:`moe_parallel.router.checks.agreed_order`; ``max_rows`` must be enough too."""
        where = (self.config, self.mesh, self.groups.token)
        order = agreed_order(rows, token_order, *where, training=self.training)
        if self.config.static_shapes:
            memory_rows(self.config, self.mesh, order)  # raises before anything is routed
        return order

    def through_experts(
        self,
        x_TM: Tensor,
        routing: Routing,
        token_order: TokenOrder,
        *,
        timeline: Timeline | None = None,
        with_loss: bool = False,
    ) -> tuple[Tensor, Routing]:
        """Send tokens to their experts and add up the weighted results.

        Args:
            x_TM: this rank's routed tokens.
            routing: the decision of ``gate`` for them.
            token_order: where the tokens of every rank stand.
            timeline: see :meth:`forward`.
            with_loss: compute the router's loss while rows travel, where it fits in.

        Returns:
            ``[T, hidden]``, and the routing with the drops of padded and of static shapes.

        Communication: see :meth:`moe_parallel.pipeline.pipeline.Pipeline.run`.

        Raises:
            ValueError: if a rank would take more than ``max_rows`` and none are dropped.
        """
        config, mesh, order, rows = self.config, self.mesh, None, x_TM
        impl = chosen_impl(config.impl, x_TM.device, x_TM.dtype)
        if self._sends_tokens(x_TM, routing, token_order):
            where = (mesh, self.dispatcher, token_order, self.groups.token)
            call = start_tokens(x_TM, routing, config, *where, padded=self._is_padded)
            routing, dispatch, wait, total, wanted_R = call
            self.most_rows.note(wanted_R)
        else:
            groups_for = partial(self._groups, x_TM=x_TM)
            if self._is_padded:
                routing, sent = padded_rows(routing, config, token_order, groups_for)
            else:
                chosen = partial(self.experts.chosen_gemm, dtype=x_TM.dtype)
                sent = kept_rows(routing, config, mesh, token_order, groups_for, chosen)
            wait, kept, total, order = sent.wait, sent.kept, sent.total, sent.order
            if config.max_rows is not None and not config.static_shapes:
                wait, kept = partial(checked_rows, wait, config.max_rows, mesh), None
            dispatch = self.dispatcher.start_call(
                wait, sent.groups, most_rows=sent.most, like=x_TM, kept=kept, impl=impl
            )
            dispatch.static, dispatch.ends, place = config.static_shapes, order.ends, dispatch.place
            order = order if place is None else replace(order, place=place)
            rows = permute(x_TM, order, impl)  # while the host may wait for the counts
        if with_loss and dispatch.early:
            routing = routing._replace(loss=routing.aux_loss)
        shared = self.shared and self.shared.start(x_TM, aside=bool(dispatch.lanes))
        # Few rows are one grouped product, if their dtype has one, which needs no counts.
        mean_rows = 0 if config.static_shapes else total // mesh.num_token_ranks * mesh.etp_size
        output_TM: Tensor = self.experts(rows, Pipeline(dispatch, timeline), num_rows=mean_rows)
        if order is not None:
            output_TM = unpermute(output_TM, routing.weights, order, impl)
        if mesh.num_token_ranks > 1 and not config.static_shapes:
            wait()  # where nothing did yet: ranks that differ in the counts raise
        return output_TM if shared is None else output_TM + shared(), routing

    @property
    def _is_padded(self) -> bool:
        return self.config.pad_to_capacity and self.training

    def _sends_tokens(self, x_TM: Tensor, routing: Routing, token_order: TokenOrder) -> bool:
        """Whether tokens cross once, see :func:`moe_parallel.dispatch.sending.tokens_pay`."""
        fits = partial(tokens_pay, self.config, self.mesh, padded=self._is_padded)
        if routing.counts.tokens is None or not fits(1):
            return False
        return fits(len(self._groups(token_order.num_tokens * self.config.top_k, x_TM)[0]))

    def _groups(self, num_rows: int, x_TM: Tensor) -> tuple[tuple[range, ...], Tensor | None]:
        return call_groups(self.config, self.mesh, self.dispatcher, num_rows, x_TM)
