"""Ring attention as operators of ``torch.ops.ring``.

Each direction is one operator, so that a compiler keeps it as it is and a checkpoint can keep its
results: documents are data to both, and a graph is good for every pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.autocast import without_autocast
from lasp._core.checks import checked_rank
from lasp._core.consistency import compare_first_call, is_compared
from lasp._core.derivatives import Reference
from lasp._core.dtypes import wide_dtype
from lasp._core.operators import Operators
from lasp.sequence.layout import SequenceLayout, one_document
from lasp.sequence.positions import positions
from ring import passes
from ring.blocks.merge import Partial
from ring.blocks.registry import resolve_block
from ring.blocks.sinks import sink_gradients
from ring.exchange import KV
from ring.expansion import LatentExpansion
from ring.planner.schedule import plan_ring

# The group by its name; an empty one for one rank without a group.
_WHERE = "Tensor lengths, int num_ranks, str order, str group"
_SETTINGS = f"{_WHERE}, bool causal, int[2] window, float scale, str block"
_RESULTS = "(Tensor output, Tensor lse)"
_REFERENCE = Reference("ring_attention", "ring.reference.dense_attention")


def check_kinds(layout: SequenceLayout | None, cp_group: dist.ProcessGroup | None) -> None:
    """Raise ValueError for what is no layout or no group that holds this rank."""
    if layout is not None and not isinstance(layout, SequenceLayout):
        raise ValueError(f"layout must be a SequenceLayout, got {layout!r}: build one from lengths")
    if cp_group is not None and not isinstance(cp_group, dist.ProcessGroup):
        raise ValueError(
            f"cp_group must be a process group that holds this rank, got {cp_group!r}: call the"
            " operator on the members of the group only"
        )


def checked_positions(
    hidden: Tensor,
    hidden_size: int,
    layout: SequenceLayout | None,
    cp_group: dist.ProcessGroup | None,
) -> Tensor:
    """Positions of the tokens that a layer is called with; ValueError for what it does not take."""
    if hidden.ndim not in (2, 3) or hidden.shape[-1] != hidden_size or hidden.numel() == 0:
        raise ValueError(
            f"hidden must be [T, {hidden_size}] or [B, T, {hidden_size}] with at least one"
            f" token, got {tuple(hidden.shape)}: drop empty batches"
        )
    check_kinds(layout, cp_group)
    return positions("hidden", hidden, -2, layout, cp_group)


def lengths_and_group(
    num_tokens: int, layout: SequenceLayout | None, cp_group: dist.ProcessGroup | None
) -> tuple[Tensor, int, str, str]:
    """Layout and group as a schema takes them."""
    group = "" if cp_group is None else cp_group.group_name
    if layout is None and (torch.compiler.is_compiling() or type(num_tokens) is not int):
        lengths = torch.full((1,), num_tokens, dtype=torch.int64, device="cpu")  # it is data
        return lengths, 1, "contiguous", group
    if layout is None:
        layout = one_document(num_tokens)
    return layout._lengths, layout.num_ranks, layout.order, group


Source = tuple[KV, LatentExpansion | None, int]  # what moves, what expands it, and the value dim


def _keys_and_values(q: Tensor, k: Tensor, v: Tensor) -> Source:
    """Contiguous: dense kernels would copy strided rows tile by tile."""
    return (k.contiguous(), v.contiguous()), None, v.shape[-1]


def _latent(q: Tensor, latent: Tensor, weight: Tensor) -> Source:
    """The latent moves; the width of values is what the weight has beyond the keys' own part."""
    own_key = q.shape[-1] - (latent.shape[-1] - weight.shape[-1])
    value_dim = weight.shape[1] - own_key
    return (latent.contiguous(),), LatentExpansion(weight, value_dim), value_dim


class _AttentionOperators:
    """Attention and its backward as operators, of q and two tensors that keys and values are.

    Args:
        name: of the operator, as in ``torch.ops.ring``.
        user_name: of the function that users call.
        names: of the two tensors.
        source: makes of q and the two what moves, what expands it, and the value dim.
    """

    def __init__(
        self,
        name: str,
        user_name: str,
        names: tuple[str, str],
        source: Callable[[Tensor, Tensor, Tensor], Source],
    ) -> None:
        self._user_name, self._names, self._source = user_name, names, source
        tensors = f"Tensor q, Tensor {names[0]}, Tensor {names[1]}"
        gradients = f"(Tensor dq, Tensor d{names[0]}, Tensor d{names[1]})"
        _OPERATORS.define(
            f"{name}({tensors}, Tensor? sinks, {_SETTINGS}) -> {_RESULTS}",
            self._forward,
            self._fake,
        )
        _OPERATORS.define(
            f"{name}_backward(Tensor doutput, Tensor? dlse, {tensors}, Tensor output, Tensor lse,"
            f" {_SETTINGS}) -> {gradients}",
            self._backward,
            lambda doutput, dlse, *tensors: tuple(x.new_empty(x.shape) for x in tensors[:3]),
        )
        self.call: Callable[..., Any] = _OPERATORS.differentiate(
            name, self._gradients, _save, _REFERENCE
        )
        backward = _OPERATORS.refuse_second_derivatives(f"{name}_backward", _REFERENCE)
        self._call_backward = backward

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        moving, context = self._context(q, k, v, sinks, *settings)
        with without_autocast(q):
            output, lse = passes.forward(q.contiguous(), moving, context, sinks)
        # Rows last in memory, whatever the block: as compiled graphs are told.
        return output.contiguous(), lse if lse.T.is_contiguous() else lse.T.contiguous().T

    def _backward(
        self,
        doutput: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        output: Tensor,
        lse: Tensor,
        *settings: Any,
    ) -> tuple[Tensor, ...]:
        moving, context = self._context(q, k, v, None, *settings)
        merged = Partial(output, lse)
        with without_autocast(q):
            gradients = passes.backward(doutput, dlse, merged, q.contiguous(), moving, context)
        if context.expansion is not None:
            gradients += (context.expansion.dweight.view(v.shape).to(v.dtype),)
        return tuple([x.contiguous() for x in gradients])

    def _fake(self, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        value_dim = self._source(q, k, v)[2]
        lse = q.new_empty(q.shape[1], q.shape[0], dtype=wide_dtype(q.dtype)).T
        return q.new_empty(*q.shape[:2], value_dim), lse

    def _gradients(
        self, ctx: Any, doutput: Tensor | None, dlse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, sinks, lengths = ctx.saved_tensors
        if doutput is None:  # not used here; others may wait for the gradients of their keys
            doutput = torch.zeros_like(tensors[3])
        gradients = self._call_backward(doutput, dlse, *tensors, lengths, *ctx.settings)
        dsinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            dsinks = sink_gradients(sinks, doutput, dlse, *tensors[3:])
        return *gradients, dsinks, *(None,) * (1 + len(ctx.settings))

    def _context(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *settings: Any
    ) -> tuple[KV, passes.RingContext]:
        """What moves, and the rest: checks what a graph does not know, before communication."""
        lengths, num_ranks, order, group, causal, window, scale, block = settings
        cp_group = _group(group)
        layout = SequenceLayout.from_lengths_tensor(lengths, num_ranks, order)
        if cp_group is not None and not is_compared(self._user_name, cp_group):
            tensors = zip(("q", *self._names), (q, k, v))
            how: dict[str, object] = {"dtype": q.dtype, **{n: list(x.shape) for n, x in tensors}}
            how |= {"causal": causal, "window": list(window), "scale": scale}
            how["sinks"] = None if sinks is None else sinks.dtype
            how["layout"] = layout.summary
            compare_first_call(self._user_name, cp_group, q, how)
        rank = checked_rank("q", q, -3, layout, cp_group)
        moving, expansion, value_dim = self._source(q, k, v)
        grouped = expansion is None and q.shape[1] >= 2 * moving[0].shape[1]
        schedule = plan_ring(layout, rank, causal, window=tuple(window), grouped=grouped)
        kernel = resolve_block(
            block, q.device, q.dtype, q.shape[-1], value_dim, slides=schedule.slides
        )
        return moving, passes.RingContext(schedule, cp_group, kernel, scale, expansion)


def _group(name: str) -> dist.ProcessGroup | None:
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5])
    ctx.settings = inputs[5:]
    ctx.set_materialize_grads(False)  # a gradient of the lse would be work


_OPERATORS = Operators("ring")
ATTENTION = _AttentionOperators("attention", "ring_attention", ("k", "v"), _keys_and_values).call
LATENT_ATTENTION = _AttentionOperators(
    "latent_attention", "ring_latent_attention", ("latent", "weight"), _latent
).call
