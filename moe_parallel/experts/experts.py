"""The experts of one rank: SwiGLU feed-forward networks over rows grouped by expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lasp._core.autocast import autocast_inputs, without_autocast
from lasp._core.derivatives import (
    Reference,
    anchor,
    refuse_second_derivatives,
    refuse_transforms,
)
from lasp._core.dtensors import local
from lasp._core.impl import ChosenImpl, Impl, chosen_impl
from lasp._core.joint_backward import join_backward
from moe_parallel.config import Gemm
from moe_parallel.dispatch.dispatcher import Dispatch
from moe_parallel.experts.gemm import (
    ChosenGemm,
    Counts,
    backward_product,
    chosen_gemm,
    ends_of,
    forward_product,
    grouped_weight_product,
    weight_product,
    weights_at_once,
)
from moe_parallel.experts.shard import ExpertShard, ShardedDims, generator_of
from moe_parallel.experts.swiglu import swiglu, swiglu_backward, weighted_swiglu_backward
from moe_parallel.pipeline.pipeline import Pipeline

_REFERENCE = Reference("ExpertParallelMoE's experts", "moe_parallel.reference.reference_moe")


class Experts(ExpertShard):
    """This rank's part of E SwiGLU experts: rows in, rows out.

    Row x of expert e: y = w2[e] (silu(w13[e, 0] x) * w13[e, 1] x). With ``etp_size`` > 1 each rank
    holds F / etp_size of the FFN dimension, and y is this rank's partial sum over ETP.

    Parameters: ``w13`` ``[E_local, 2, F_local, hidden]`` (gate, up), ``w2``
    ``[E_local, hidden, F_local]``; :meth:`sharding` tells how they are cut out of the whole. Where
    they are cut, ``state_dict()`` raises and no wrapper may shard them until they are DTensors
    (:func:`moe_parallel.distribute_experts`), of which shapes are those of the whole.

    Args:
        hidden_size: width of a row.
        ffn_size: F, of a whole expert.
        num_experts: E, on all EP ranks; EP rank r holds experts r E_local to (r + 1) E_local - 1.
        ep_rank: this rank in the EP group.
        ep_size: EP ranks.
        etp_rank: this rank in the ETP group.
        etp_size: ETP ranks.
        gemm: ``loop``, one matrix product an expert, any dtype; ``grouped``, one
            ``torch.nn.functional.grouped_mm`` for all experts, not float64, rows of 16-byte
            multiples; ``auto``, loop for experts of ``gemm.LOOP_ROWS`` rows and more whose first
            product has ``gemm.LOOP_FLOPS`` and more, else grouped for bfloat16 on CUDA with such
            rows, else loop.
        impl: of the activation between them, see :func:`lasp._core.impl.chosen_impl`.
        device: of the parameters.
        dtype: of the parameters.

    Parameters begin without values. ``recomputes`` keeps less for the backward: :meth:`forward`.

    Raises:
        ValueError: naming the argument, if the sizes do not divide or ``gemm`` cannot run.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        *,
        ep_rank: int = 0,
        ep_size: int = 1,
        etp_rank: int = 0,
        etp_size: int = 1,
        gemm: Gemm = "auto",
        impl: Impl = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(ep_rank, ep_size, etp_rank, etp_size)
        if num_experts % ep_size:
            raise ValueError(
                f"num_experts must divide over the ep group, got {num_experts} experts"
                f" over {ep_size} ranks"
            )
        if ffn_size % etp_size:
            raise ValueError(
                f"ffn_size must divide over the etp group, got {ffn_size} over {etp_size} ranks"
            )
        if gemm not in get_args(Gemm):
            raise ValueError(f"gemm must be one of {get_args(Gemm)}, got {gemm!r}")
        self.hidden_size, self.ffn_size, self.num_experts = hidden_size, ffn_size, num_experts
        self.num_local, self.ffn_local = num_experts // ep_size, ffn_size // etp_size
        self.gemm: Gemm = gemm
        self.impl: Impl = impl
        self.recomputes = False
        shape_w13 = (self.num_local, 2, self.ffn_local, hidden_size)
        shape_w2 = (self.num_local, hidden_size, self.ffn_local)
        self.w13 = nn.Parameter(torch.empty(shape_w13, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(shape_w2, device=device, dtype=dtype))
        self.chosen_gemm(0)  # raises here, not between two collectives; and so does the other
        chosen_impl(impl, self.w13.device, self.w13.dtype)

    @staticmethod
    def sharding() -> dict[str, ShardedDims]:
        """For each parameter the dims cut over EP and ETP, in equal blocks in rank order."""
        return {"w13": ShardedDims(ep_dim=0, etp_dim=2), "w2": ShardedDims(ep_dim=0, etp_dim=2)}

    def reset_parameters(self, seed: int, *, gain: float = 1.0) -> None:
        """Fill with Xavier normal values.

        Args:
            seed: see :meth:`fill`.
            gain: factor of the standard deviation sqrt(2 / (fan_in + fan_out)).
        """
        std = gain * math.sqrt(2 / (self.hidden_size + self.ffn_size))
        self.fill(seed, lambda _, whole, generator: whole.normal_(0, std, generator=generator))

    @torch.no_grad()
    def fill(self, seed: int, draw: Callable[[str, Tensor, torch.Generator], object]) -> None:
        """Fill with values that depend on (seed, expert) alone, not on the mesh.

        Each local expert is drawn whole, in float32 on the CPU, from a generator of its own; its
        ETP part is cut out. Parameters on the meta device are left alone.

        Args:
            seed: the same on every rank; give every layer another.
            draw: fills in place the ``w13`` ``[2, F, hidden]`` of an expert, then its ``w2``
                ``[hidden, F]``: called with the name, the tensor and the generator.
        """
        if self.w13.is_meta:
            return
        # Seeds are drawn, so that expert e + 1 under one seed is not expert e under the next.
        seeds = torch.randint(
            2**63 - 1, (self.num_experts,), generator=generator_of(seed), device="cpu"
        ).tolist()
        part = slice(self.etp_rank * self.ffn_local, (self.etp_rank + 1) * self.ffn_local)
        w13_part, w2_part = local(self.w13), local(self.w2)
        for expert in range(self.num_local):
            generator = generator_of(seeds[self.ep_rank * self.num_local + expert])
            w13 = torch.empty(2, self.ffn_size, self.hidden_size, device="cpu", dtype=torch.float32)
            w2 = torch.empty(self.hidden_size, self.ffn_size, device="cpu", dtype=torch.float32)
            draw("w13", w13, generator)
            draw("w2", w2, generator)
            w13_part[expert].copy_(w13[:, part])
            w2_part[expert].copy_(w2[:, part])

    def chosen_gemm(self, num_rows: int, dtype: torch.dtype | None = None) -> ChosenGemm:
        """The product that ``gemm`` chooses for so many rows.

        Args:
            num_rows: that the experts of this rank take together, on average.
            dtype: of rows and weights; None: of the parameters as they are now.

        Raises:
            ValueError: if ``grouped`` was asked for and cannot run.
        """
        w13, sizes = self.w13, (self.num_local, self.hidden_size, self.ffn_local)
        return chosen_gemm(self.gemm, dtype or w13.dtype, sizes, num_rows if w13.is_cuda else None)

    def forward(self, rows_AM: Tensor, pipeline: Pipeline, *, num_rows: int) -> Tensor:
        """Send rows to their experts on other ranks, apply these, and bring the results back.

        Args:
            rows_AM: ``[A, hidden]``, in the order of
                :meth:`moe_parallel.pipeline.pipeline.Pipeline.run`; tokens ``[T, hidden]``, where
                the dispatch makes rows of them.
            pipeline: moves the rows, in groups of experts; for rows that are with their experts
                already :func:`moe_parallel.pipeline.pipeline.local_pipeline`.
            num_rows: rows that a rank's experts take, averaged over ranks: all choose one product.

        Returns:
            ``[A, hidden]``, or ``[T, hidden]``, in the same order.

        Gradients: to rows, ``w13`` and ``w2``, and the weights of the dispatch; exact zeros for an
        expert without rows. Kept of each row that an expert takes: it and both halves of its first
        product, hidden + 2 F_local elements; with ``recomputes`` the row alone, and the backward
        makes this product again. Under autocast rows and weights are cast to its dtype.

        Communication: of :meth:`moe_parallel.pipeline.pipeline.Pipeline.run`, in the backward
        again, which every rank must run, one that needs no gradient itself too: over several ranks
        the results require gradients wherever gradients are enabled. The host waits for nothing but
        the counts, on one rank with ``grouped`` for nothing; over several ``grouped`` queues small
        copies to the device.
        """
        rows_AM, w13, w2 = autocast_inputs(rows_AM, local(self.w13), local(self.w2))
        dispatch, dtype = pipeline.dispatch, rows_AM.dtype
        if w13.dtype != dtype:
            raise ValueError(f"rows must be {w13.dtype} like the experts, got {dtype}")
        refuse_transforms(_REFERENCE, rows_AM, w13, w2, dispatch.weights)
        for group in dispatch.process_groups:
            rows_AM = join_backward(group, rows_AM, w13, w2)
        how = (self.chosen_gemm(num_rows, dtype), chosen_impl(self.impl, rows_AM.device, dtype))
        # Rows that stay, in one group, are kept for the backward: they are their own anchor.
        stay = not dispatch.lanes and len(dispatch.experts) == 1
        tensors = (rows_AM, w13, w2, dispatch.weights, None if stay else anchor(rows_AM))
        results: Tensor = _OverRanks.apply(*tensors, pipeline, *how, self.recomputes)  # type: ignore[no-untyped-call]
        return results


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_AM: Tensor,
        w13: Tensor,
        w2: Tensor,
        weights_Tk: Tensor | None,
        anchor_0M: Tensor | None,
        pipeline: Pipeline,
        gemm: ChosenGemm,
        impl: ChosenImpl,
        recomputes: bool,
    ) -> Tensor:
        kept: list[Tensor] = []
        dispatch, w13_ENM = pipeline.dispatch, w13.flatten(1, 2)

        def compute(g: int, rows: Tensor) -> Tensor:
            counts = dispatch.expert_rows(g) if gemm == "loop" else _ends_or_counts(dispatch, g)
            hidden = forward_product(rows, _own(w13_ENM, dispatch, g), counts, gemm)
            kept.extend((rows,) if recomputes else (rows, hidden))
            return forward_product(swiglu(hidden, impl), _own(w2, dispatch, g), counts, gemm)

        with without_autocast(rows_AM):
            results = dispatch.to_tokens(pipeline.run(dispatch.to_rows(rows_AM), compute))
        ctx.save_for_backward(anchor_0M, w13, w2, weights_Tk, *kept)
        ctx.arguments = (pipeline, gemm, impl)
        return results

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(ctx: Any, grad_AM: Tensor) -> tuple[Tensor | None, ...]:
        _, w13, w2, _, *kept = ctx.saved_tensors
        pipeline, gemm, impl = ctx.arguments
        dispatch, w13_ENM = pipeline.dispatch, w13.flatten(1, 2)
        groups = len(dispatch.experts)
        each = len(kept) // groups  # tensors of a group: its rows; also their first product
        wanted, dws = any(ctx.needs_input_grad[1:3]), dict[int, Tensor]()
        if wanted and groups > 1:  # written in the turns of all groups: memory of none of them
            dws |= enumerate(map(torch.empty_like, (w13_ENM, w2)))
        made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # what weight gradients are made of

        def compute(g: int, dy: Tensor) -> Tensor:
            counts = dispatch.expert_rows(g) if gemm == "loop" else _ends_or_counts(dispatch, g)
            hidden = kept[each * (g + 1) - 1]
            if each == 1:
                hidden = forward_product(hidden, _own(w13_ENM, dispatch, g), counts, gemm)
            dact = backward_product(dy, _own(w2, dispatch, g), counts, gemm)
            weights_A = dispatch.row_weights
            if weights_A is None:
                dhidden, act = swiglu_backward(dact, hidden, impl)
            else:
                found = weighted_swiglu_backward(dact, hidden, weights_A, impl)
                dhidden, act, dispatch.row_gradients = found
            made[g] = (dy, dhidden, act)
            return backward_product(dhidden, _own(w13_ENM, dispatch, g), counts, gemm)

        def weights(g: int) -> None:
            dy, dhidden, act = made.pop(g)
            with pipeline.computing("weights", g, dy.device):
                for i, (a, b) in enumerate(((dhidden, kept[each * g]), (dy, act))):
                    at_once = dispatch.static or weights_at_once(a, b)
                    if gemm != "loop" and groups == 1 and at_once:
                        ends = ends_of(_ends_or_counts(dispatch, g), dy.device)
                        dws[i] = grouped_weight_product(a, b, ends)
                        continue
                    if i not in dws:
                        dws[i] = torch.empty_like((w13_ENM, w2)[i])
                    weight_product(a, b, dispatch.expert_rows(g), gemm, _own(dws[i], dispatch, g))

        with without_autocast(grad_AM):
            # An expanded gradient has strides that products reject.
            grad_AM = dispatch.to_rows(grad_AM.contiguous())
            drows = pipeline.run(grad_AM, compute, weights if wanted else None)
            dx, dweights = dispatch.to_tokens(drows), dispatch.weight_gradients(drows)
        dw13, dw2 = (dws[0].view_as(w13), dws[1]) if wanted else (None, None)
        return dx, dw13, dw2, dweights, *(None,) * 5


def _own(weight_E: Tensor, dispatch: Dispatch, g: int) -> Tensor:
    """The part of the experts of a group; of a single group all, which costs nothing."""
    own = dispatch.experts[g]
    return weight_E if len(dispatch.experts) == 1 else weight_E[own.start : own.stop]


def _ends_or_counts(dispatch: Dispatch, g: int) -> Counts:
    """Rows of the group's experts: their ends, where the device knows them, else the counts."""
    ends = dispatch.expert_ends(g)
    return dispatch.expert_rows(g) if ends is None else ends
