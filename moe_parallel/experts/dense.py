"""A dense SwiGLU feed-forward network: a shared expert, or a layer without experts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lasp._core.autocast import autocast_inputs, without_autocast
from lasp._core.derivatives import Reference, refuse_second_derivatives, refuse_transforms
from lasp._core.impl import ChosenImpl, Impl, chosen_impl
from moe_parallel.experts.swiglu import swiglu, swiglu_backward
from moe_parallel.pipeline.streams import other_stream

_REFERENCE = Reference("DenseFFN", "moe_parallel.reference.reference_moe")


class DenseFFN(nn.Module):
    """y = w2 (silu(w13[0] x) * w13[1] x), times sigmoid(gate x) if it is gated.

    Parameters: ``w13`` ``[2, F, hidden]`` (gate, up), ``w2`` ``[hidden, F]``, and of a gated one
    ``gate`` ``[1, hidden]``; whole on every rank. They have no values until
    :meth:`reset_parameters` or a checkpoint fills them.

    Args:
        hidden_size: width of a token.
        ffn_size: F.
        gated: whether it has a gate of its own, as in Qwen2-MoE.
        impl: of the activation, see :func:`lasp._core.impl.chosen_impl`.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        gated: bool = False,
        impl: Impl = "auto",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.impl: Impl = impl
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.w13 = nn.Parameter(empty(2, ffn_size, hidden_size))
        self.w2 = nn.Parameter(empty(hidden_size, ffn_size))
        self.gate = nn.Parameter(empty(1, hidden_size)) if gated else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, *, gain: float = 1.0) -> None:
        """Fill with Xavier normal values of a CPU generator, the experts' distribution.

        Args:
            generator: in the same state on every rank.
            gain: factor of the standard deviation, but of the gate's.
        """
        if self.w13.is_meta:
            return
        hidden_size, ffn_size = self.w2.shape
        std = gain * math.sqrt(2 / (hidden_size + ffn_size))
        parts = [(self.w13, std), (self.w2, std)]
        parts += [] if self.gate is None else [(self.gate, math.sqrt(2 / (hidden_size + 1)))]
        for weight, deviation in parts:
            drawn = torch.empty(weight.shape, device="cpu", dtype=torch.float32)
            weight.copy_(drawn.normal_(0, deviation, generator=generator))

    def forward(self, x_TM: Tensor) -> Tensor:
        """``[T, hidden]`` of ``[T, hidden]``.

        Gradients: to tokens and parameters, once. Kept for the backward: the tokens, and both
        halves of the first product, 2 F elements a token.
        """
        x_TM, w13, w2 = autocast_inputs(x_TM, self.w13, self.w2)
        refuse_transforms(_REFERENCE, x_TM, w13, w2)
        impl = chosen_impl(self.impl, x_TM.device, x_TM.dtype)
        y_TM: Tensor = _Dense.apply(x_TM, w13, w2, impl)  # type: ignore[no-untyped-call]
        if self.gate is None:
            return y_TM
        return y_TM * nn.functional.linear(x_TM, self.gate).sigmoid()

    def start(self, x_TM: Tensor, *, aside: bool) -> Callable[[], Tensor]:
        """Queue :meth:`forward`; what is returned makes the current stream wait for its result.

        Args:
            x_TM: tokens.
            aside: on a GPU another stream computes, forward and backward, while rows travel.
        """
        if not (aside and x_TM.is_cuda):
            computed: Tensor = self(x_TM)
            return lambda: computed
        current, other = torch.cuda.current_stream(x_TM.device), other_stream(x_TM.device)
        other.wait_stream(current)
        with torch.cuda.stream(other):
            y_TM: Tensor = self(x_TM)
        x_TM.record_stream(other)  # its backward reads them there
        node: Any = y_TM.grad_fn
        if node is not None:
            # First in the backward, before the host is busy with the rows of the experts.
            for first in (node,) if self.gate is None else (node, node.next_functions[0][0]):
                first._set_sequence_nr(torch.iinfo(torch.int64).max)

        def joined() -> Tensor:
            current.wait_stream(other)
            y_TM.record_stream(current)
            return y_TM

        return joined


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TM: Tensor, w13: Tensor, w2: Tensor, impl: ChosenImpl) -> Tensor:
        with without_autocast(x_TM):
            hidden_T2F = x_TM @ w13.flatten(0, 1).T
            y_TM = swiglu(hidden_T2F, impl) @ w2.T
        ctx.save_for_backward(x_TM, w13, w2, hidden_T2F)
        ctx.impl = impl
        return y_TM

    @staticmethod
    @refuse_second_derivatives(_REFERENCE)
    def backward(ctx: Any, dy_TM: Tensor) -> tuple[Tensor | None, ...]:
        x_TM, w13, w2, hidden_T2F = ctx.saved_tensors
        for_x, for_w13, for_w2, _ = ctx.needs_input_grad
        with without_autocast(dy_TM):
            dhidden_T2F, act_TF = swiglu_backward(dy_TM @ w2, hidden_T2F, ctx.impl)
            dx_TM = dhidden_T2F @ w13.flatten(0, 1) if for_x else None
            dw13 = (dhidden_T2F.T @ x_TM).view_as(w13) if for_w13 else None
            dw2 = dy_TM.T @ act_TF if for_w2 else None
        return dx_TM, dw13, dw2, None
