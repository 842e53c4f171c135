"""``lightning_attention(impl="triton")`` as operators of ``torch.ops.lasp``.

Each direction is one operator, so that a compiler keeps it as it is: documents and rates are data
to it, and a graph is good for every pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from lasp._core.graphs import data_dependent_size
from lasp._core.joint_backward import join_backward
from lasp._core.operators import Operators
from lasp.lightning.op_context import REFERENCE, Settings
from lasp.lightning.triton import schedule as fused
from lasp.lightning.validation import check_first_call, check_kinds
from lasp.sequence.layout import Order, SequenceLayout, one_document

# cp_group is the name of the process group; empty: none.
_SETTINGS = (
    "Tensor lengths, int num_ranks, str order, str cp_group,"
    " float scale, str exchange, bool output_final_state, float state_eps"
)
_SCHEMA = (
    f"attention(Tensor q, Tensor k, Tensor v, Tensor rates, Tensor? initial_state, {_SETTINGS})"
    " -> (Tensor output, Tensor final_state, Tensor states, Tensor incoming)"
)
_BACKWARD_SCHEMA = (
    "attention_backward(Tensor? grad_output, Tensor? grad_final, Tensor q, Tensor k, Tensor v,"
    " Tensor rates, Tensor? initial_state, Tensor states, Tensor incoming, bool needs_initial,"
    f" {_SETTINGS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor grad_initial)"
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    initial_state: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor | None]:
    """Output and final state; arguments as those of ``lightning_attention``."""
    layout, cp_group, scale, exchange, output_final_state, state_eps = settings
    # What the schema cannot say; the operator checks the rest when it runs.
    check_kinds(rates, q, settings)
    q = join_backward(cp_group, q, k, v, initial_state)
    if layout is not None:
        lengths, num_ranks, order = layout._lengths, layout.num_ranks, layout.order
    elif torch.compiler.is_compiling():  # the length is data
        lengths = torch.full((1,), q.shape[-3], dtype=torch.int64, device="cpu")
        num_ranks, order = 1, "contiguous"
    else:
        lengths, num_ranks, order = one_document(q.shape[-3])._lengths, 1, "contiguous"
    group_name = "" if cp_group is None else cp_group.group_name
    output, final_state, _, _ = _call(
        q, k, v, rates, initial_state, lengths, num_ranks, order, group_name,
        scale, exchange, output_final_state, state_eps,
    )  # fmt: skip
    return output, final_state if output_final_state else None


def _attention(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial_state: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _settings(*settings)
    if call.cp_group is not None:  # here: plans do not know it
        check_first_call(q, v, rates, call)
    return fused.forward(q, k, v, rates, initial_state, call)


def _attention_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments as the schema has them; the first ten are no settings."""
    given = *arguments[:10], _settings(*arguments[10:])
    return fused.backward(*given)


def _settings(
    lengths: Tensor, num_ranks: int, order: Order, cp_group: str, *others: Any
) -> Settings:
    return Settings(
        SequenceLayout.from_lengths_tensor(lengths, num_ranks, order),
        _resolve_process_group(cp_group) if cp_group else None,  # type: ignore[arg-type]
        *others,
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output[2:])
    ctx.settings = inputs[5:]  # with the lengths, which are those of a layout as they are
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, grad_output: Tensor | None, grad_final: Tensor | None, *_: object
) -> tuple[Tensor | None, ...]:
    needs_initial = ctx.needs_input_grad[4]
    if not ctx.settings[6]:  # the final state was not asked for
        grad_final = None
    dq, dk, dv, grad_initial = _call_backward(
        grad_output, grad_final, *ctx.saved_tensors, needs_initial, *ctx.settings
    )
    return dq, dk, dv, None, grad_initial if needs_initial else None, *(None,) * 8


def _fake(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, initial_state: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths, with_final_state = settings[0], settings[6]
    rows = q.shape[0] if q.dim() == 4 else lengths.shape[-1]
    final_state = v.new_empty(
        (rows, q.shape[-2], q.shape[-1], v.shape[-1]) if with_final_state else 0,
        dtype=torch.float32,
    )
    return (
        _fake_rows(q, v),
        final_state,
        # Segments and runs depend on the documents.
        final_state.new_empty(data_dependent_size()),
        final_state.new_empty(data_dependent_size()),
    )


def _fake_rows(q: Tensor, x: Tensor) -> Tensor:
    """A result of the shape of ``x``, with the strides that results have."""
    if q.dim() == 3:
        return x.new_empty(x.shape)
    return x.new_empty(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, _rates, initial_state, states, _incoming, needs_initial = arguments[2:10]
    shape = initial_state.shape if needs_initial and initial_state is not None else 0
    initial = states.new_empty(shape)
    return _fake_rows(q, q), _fake_rows(q, k), _fake_rows(q, v), initial


_OPERATORS = Operators("lasp")
_OPERATORS.define(_SCHEMA, _attention, _fake)
_OPERATORS.define(_BACKWARD_SCHEMA, _attention_backward, _fake_backward)
_call = _OPERATORS.differentiate("attention", _gradients, _save, REFERENCE)
_call_backward = _OPERATORS.refuse_second_derivatives("attention_backward", REFERENCE)
