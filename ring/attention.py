"""Exact softmax attention over a packed batch cut across ranks, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from lasp._core.autocast import autocast_inputs
from lasp._core.joint_backward import join_backward
from lasp.sequence.layout import SequenceLayout
from ring.torch_ops import attend
from ring.validation import check_kinds, check_tensors


class RingOutput(NamedTuple):
    """What :func:`ring_attention` returns.

    Attributes:
        output: ``[T, Hq, D]`` or ``[B, T, Hq, D]``, dtype of ``q``.
        lse: log-sum-exp of each row's scores, ``[T, Hq]`` or ``[B, T, Hq]``, float32 (float64 for
            float64).
    """

    output: Tensor
    lse: Tensor


def ring_attention(  # the operator: its arguments are its documentation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    cp_group: dist.ProcessGroup | None = None,
    causal: bool = True,
    scale: float | None = None,
    block: str = "auto",
) -> RingOutput:
    """Softmax attention within each document of a pack whose tokens are spread over ranks.

    For query t and the keys s of its document, on whatever rank (s <= t if causal)::

        lse_t = log sum_s exp(scale q_t . k_s)        o_t = sum_s exp(scale q_t . k_s - lse_t) v_s

    Exact for any document lengths, any number of ranks and any order of the layout. Tokens of
    the layout's tail padding attend to padding only; their rows are finite and mean nothing.

    Args:
        q: ``[T, Hq, D]``, the tokens of this rank; or ``[B, T, Hq, D]``, B rows under one layout
            of one document. float16, bfloat16, float32 or float64; under autocast q, k and v are
            cast to its dtype.
        k: ``[T, Hkv, D]`` or ``[B, T, Hkv, D]``, dtype and device of ``q``. Hkv divides Hq; query
            head h reads key head h // (Hq / Hkv).
        v: as ``k``.
        layout: the same on every rank. None: the T tokens are one document, on one rank.
        cp_group: the P = ``layout.num_ranks`` ranks that hold the pack. None: one rank.
        causal: a query sees itself and what comes before it in its document; else all of it.
        scale: factor of the scores; None: 1 / sqrt(D).
        block: kernel, ``auto``, ``cudnn``, ``flash``, ``cpu_flash`` or ``eager``: see
            :func:`ring.blocks.registry.resolve_block`.

    Returns:
        Output and log-sum-exp of this rank's tokens.

    Gradients: to ``q``, ``k`` and ``v``, once, from output and lse. Every rank must run
    the backward, one whose own inputs need no gradient too: over several ranks the results require
    gradients wherever gradients are enabled (``torch.no_grad()`` is for what no rank trains). A
    loss that depends on the lse (a z-loss, an attention sink) makes the kernels of that rank's
    backward run twice; else the lse costs nothing. Contributions to each are summed in float32
    (float64 for float64) in a fixed order. Two runs are bit-identical with ``eager`` and
    ``cpu_flash``, and with ``flash`` under ``torch.use_deterministic_algorithms(True)``. Saved for
    it: q, k, v, output and lse.

    Communication: in 1 to 4 stages, under the attention to what came before. Forward: every
    rank receives the keys and values that its rows need from others, each once: ``2 R Hkv D``
    elements, R = ``plan_ring(layout, rank, causal).received_tokens``. Backward: the same again,
    and as many gradients in float32, which end at the ranks that hold the keys.
    One all-to-all a stage, and none at all, on any rank, if no document needs it. In memory at
    once: two stages of keys and values, in the backward of their gradients too.

    Compilation: two operators, ``torch.ops.ring.attention`` and ``attention_backward``; one graph
    is good for every pack of as many tokens. Checkpointing: see docs/ring.md for how output and lse
    are kept and the attention is not run again.

    Raises:
        ValueError: naming the argument, before any communication, if shapes, dtypes or devices
            do not fit together, the layout is of another length or number of ranks, or the block
            is unknown or cannot run these tensors.

    Source: Liu, Zaharia, Abbeel, "Ring Attention with Blockwise Transformers", arXiv:2310.01889;
    varlen over the whole pack: MiniMax-01, arXiv:2501.08313, section 3.2.1.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_tensors(q, k, v)
    check_kinds(layout, cp_group)
    q = join_backward(cp_group, q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if q.ndim == 4 and layout is not None and layout.num_documents != 1:
        raise ValueError(
            "layout must hold one document when q is [B, T, Hq, D], whose rows share it, got"
            f" {layout.num_documents}: pack the rows end to end as [T, Hq, D]"
        )
    # Rows under one layout are more heads: query head b Hq + h, key head b Hkv + h // (Hq / Hkv).
    tensors = (x.transpose(0, 1).flatten(1, 2) if x.ndim == 4 else x for x in (q, k, v))
    output, lse = attend(
        *tensors, layout=layout, cp_group=cp_group,
        causal=bool(causal), scale=scale, block=block,
    )  # fmt: skip
    if q.ndim == 4:
        heads = (q.shape[0], q.shape[2])
        output, lse = (x.unflatten(1, heads).transpose(0, 1) for x in (output, lse))
    return RingOutput(output, lse)
