"""Exact softmax attention over a packed batch cut across ranks, forward and backward.

Gradients: every rank must run the backward, also one whose own inputs need no gradient: over
several ranks the results require gradients wherever gradients are enabled (``torch.no_grad()`` is
for layers that no rank trains). A loss that depends on the lse (a z-loss) makes the kernels of that
rank's backward run twice, but for ``fa4``; else the lse costs nothing, and sinks never do.
Contributions are summed in float32 (float64 for float64) in a fixed order. Two runs are
bit-identical with ``eager`` and ``cpu_flash``, and with ``fa4`` and ``flash`` under
``torch.use_deterministic_algorithms(True)``. Saved for the backward: q, k, v, output and lse.

Communication: 1 to 4 stages, each one all-to-all under the attention to what came before; none at
all, on any rank, if no document needs it. The first call on a group also compares how ranks call
(:func:`lasp._core.consistency.check_same_calls`). Later calls compare nothing: a rank that alone
takes another layout, window or ``causal`` plans other transfers than the others expect, and the
backend ends the processes, gloo by an abort, NCCL by its timeout. With R = ``plan_ring(layout,
rank, causal).received_tokens``, the tokens that a rank needs from others, it moves

    ========  =============================  ==============================================
    forward   keys and values, once          ``R Hkv (D + V)`` elements in the dtype of ``k``
    backward  keys and values again          the same
              their gradients to the owners  ``R Hkv (D + V)`` elements in float32
    ========  =============================  ==============================================

Keys and values of two stages are in memory at once, in the backward their gradients too.

Compilation: two operators, ``torch.ops.ring.attention`` and ``attention_backward``; one graph is
good for every pack of as many tokens. Checkpointing: docs/ring.md shows how output and lse are
kept, so that the attention does not run again.

Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889; varlen
over the whole pack: MiniMax-01, arXiv:2501.08313, section 3.2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.autocast import autocast_inputs
from lasp._core.checks import check_flags, checked_scale
from lasp._core.joint_backward import join_backward
from lasp.sequence.layout import SequenceLayout
from ring.torch_ops import ATTENTION, check_kinds, lengths_and_group


class RingOutput(NamedTuple):
    """What :func:`ring_attention` returns.

    Attributes:
        output: ``[T, Hq, V]`` or ``[B, T, Hq, V]``, dtype of ``q``.
        lse: log-sum-exp of each row's scores, its head's sink among them: ``[T, Hq]`` or
            ``[B, T, Hq]``, float32 (float64 for float64). It is not contiguous, because kernels
            keep all rows of a head together: flatten it with ``reshape``, not with ``view``.
    """

    output: Tensor
    lse: Tensor


class AttentionOptions(NamedTuple):
    """What :func:`ring_attention` takes besides its tensors; its docstring explains each."""

    layout: SequenceLayout | None
    cp_group: dist.ProcessGroup | None
    causal: bool
    window: tuple[int, int] | None
    sinks: Tensor | None
    scale: float | None
    block: str


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    cp_group: dist.ProcessGroup | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    block: str = "auto",
) -> RingOutput:
    """Softmax attention within each document of a pack whose tokens are spread over ranks.

    For query t and the keys s of its document, on whatever rank (s <= t if causal; from t - left to
    t + right under a window)::

        lse_t = log sum_s exp(scale q_t . k_s)        o_t = sum_s exp(scale q_t . k_s - lse_t) v_s

    Exact for any document lengths, any number of ranks and any order of the layout. Padding attends
    to padding only; its rows are finite and mean nothing.

    Args:
        q: ``[T, Hq, D]``, the tokens of this rank; or ``[B, T, Hq, D]``, B rows under one layout
            of one document. float16, bfloat16, float32 or float64; autocast casts q, k and v.
        k: ``[T, Hkv, D]`` or ``[B, T, Hkv, D]``, dtype and device of ``q``. Hkv divides Hq; query
            head h reads key head h // (Hq / Hkv).
        v: ``[T, Hkv, V]`` or ``[B, T, Hkv, V]``, dtype and device of ``q``. V may differ from D.
        layout: the same on every rank. None: the T tokens are one document, on one rank.
        cp_group: the P = ``layout.num_ranks`` ranks that hold the pack. None: one rank.
        causal: a query sees itself and what comes before it in its document; else all of it.
        window: ``(left, right)``, how many tokens before and after itself a query sees at most; -1
            is no limit. With ``causal`` right is 0 or -1. Keys outside all windows do not move.
        sinks: ``[Hq]``, floating, on the device of ``q``: a logit of each head that has no value,
            one more term ``exp(sink)`` in the sum of every row. Learnable; the same on every rank.
        scale: factor of the scores, finite; None: 1 / sqrt(D).
        block: kernel, ``auto``, ``fa4``, ``cudnn``, ``flash``, ``cpu_flash`` or ``eager``: see
            :func:`ring.blocks.registry.resolve_block`.

    Gradients: to ``q``, ``k``, ``v`` and ``sinks``, once, from output and lse; every rank runs the
    backward. Those of ``sinks`` cover the rows of this rank: sum them over the group.

    Communication: keys and values that other ranks' rows need, in the backward again with their
    gradients in float32; :mod:`ring.attention` counts them.

    Raises:
        ValueError: naming the argument, before any communication, if shapes, dtypes or devices do
            not fit together, the layout has another length or number of ranks, or the block is
            unknown or cannot run these tensors; on every rank, if ranks differ in dtype, shapes,
            layout or options in their first call on the group.
    """
    q, k, v = autocast_inputs(q, k, v)
    _check_tensors(q, k, v)
    options = AttentionOptions(layout, cp_group, causal, window, sinks, scale, block)
    if q.ndim == 4:
        k, v = _rows_as_heads(k), _rows_as_heads(v)
    return attend(ATTENTION, q, k, v, options)


def attend(
    operator: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions
) -> RingOutput:
    """Check the options and call an operator on one pack, to which rows of a batch are heads.

    Args:
        operator: of :mod:`ring.torch_ops`.
        q: ``[T, Hq, D]`` or ``[B, T, Hq, D]``, checked.
        k: keys of all rows, ``[T, B Hkv, D]``, or their latents, ``[T, B, R + P]``.
        v: values of all rows, ``[T, B Hkv, V]``, or the weight.
        options: as the user gave them.

    Raises:
        ValueError: for an option, before any communication.
    """
    layout, cp_group, causal, window, sinks, scale, block = options
    check_kinds(layout, cp_group)
    if type(causal) is not bool:
        check_flags(causal=causal)  # type: ignore[unreachable]
    window = checked_window(window, causal)
    if sinks is not None:
        sinks = _checked_sinks(sinks, q)
    q = join_backward(cp_group, q, k, v, sinks)
    scale = checked_scale(q.shape[-1] ** -0.5 if scale is None else scale)
    if scale <= 0:  # kernels scale the mask's -inf with the scores
        q, scale = q * scale, 1.0
    packed = q
    if q.ndim == 4:
        _check_rows(layout)
        packed = _rows_as_heads(q)
    where = lengths_and_group(packed.shape[0], layout, cp_group)
    output, lse = operator(packed, k, v, sinks, *where, causal, window, scale, block)
    if q.ndim == 4:
        heads = (q.shape[0], q.shape[2])
        output, lse = (x.unflatten(1, heads).transpose(0, 1) for x in (output, lse))
    return RingOutput(output, lse)


def _rows_as_heads(x: Tensor) -> Tensor:
    """``[B, T, H, D]`` as ``[T, B H, D]``: head b H + h is head h of row b."""
    return x.transpose(0, 1).flatten(1, 2)


def checked_window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """The window, (-1, -1) for None; ValueError unless it is two limits that fit ``causal``."""
    if window is None:
        return (-1, -1)
    sides = tuple(window) if isinstance(window, Sequence) else ()
    if len(sides) != 2 or any(type(side) is not int or side < -1 for side in sides):
        raise ValueError(
            f"window must be None or (left, right), two integers >= -1, got {window!r}: -1 is no"
            " limit"
        )
    if causal and sides[1] > 0:
        raise ValueError(
            f"window must end at the query with causal=True, got right = {sides[1]}: take (left, 0)"
            " or causal=False"
        )
    return sides


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless the shapes, dtypes and devices are those of one attention."""
    queries, keys, values = q.shape, k.shape, v.shape  # each read of a shape makes one
    shapes = {"q": queries, "k": keys, "v": values}
    if len(queries) not in (3, 4) or keys[:-1] != values[:-1] or len(keys) != len(queries):
        raise ValueError(
            "q must be [T, Hq, D] or [B, T, Hq, D], k [T, Hkv, D] or [B, T, Hkv, D], v like k but"
            f" for the last dim, got {shapes_of(shapes)}"
        )
    if 0 in queries or 0 in keys or values[-1] == 0:
        raise ValueError(
            f"q, k and v must not be empty, got {shapes_of(shapes)}: drop empty batches"
        )
    if queries[:-2] != keys[:-2] or queries[-1] != keys[-1]:
        raise ValueError(
            f"q and k must have the same rows, tokens and head dim, got {shapes_of(shapes)}"
        )
    if queries[-2] % keys[-2]:
        raise ValueError(
            f"the heads of k must divide those of q, got {shapes_of(shapes)}: under tensor"
            " parallelism repeat key heads or use fewer ranks"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if not k.dtype == v.dtype == q.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not k.device == v.device == q.device:
        raise ValueError(
            f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}"
        )


def shapes_of(shapes: dict[str, torch.Size]) -> str:
    """Names and shapes, as errors give them."""
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())


def _checked_sinks(sinks: Tensor, q: Tensor) -> Tensor:
    """One sink for each query head, of every row of a batch."""
    if sinks.shape != q.shape[-2:-1] or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks must be floating, [{q.shape[-2]}] as the heads of q, and on {q.device}, got"
            f" {list(sinks.shape)} of {sinks.dtype} on {sinks.device}"
        )
    return sinks.repeat(len(q)) if q.ndim == 4 else sinks


def _check_rows(layout: SequenceLayout | None) -> None:
    """Raise ValueError unless rows of a batch can share the layout."""
    if layout is not None and layout.num_documents != 1:
        raise ValueError(
            "layout must hold one document when q is [B, T, Hq, D], whose rows share it, got"
            f" {layout.num_documents}: pack the rows end to end as [T, Hq, D]"
        )
