"""Multi-head latent attention over a packed batch cut across ranks: the latent moves.

Keys and values of all heads are made of one narrow latent a token. Ranks send the latent, and make
keys and values of what arrives as they do of their own tokens. With R =
``plan_ring(layout, rank, causal).received_tokens`` and W elements of a latent::

    ========  ==========================  ================================================
    forward   latents, once               ``R W`` elements in their dtype
    backward  latents again               the same
              gradients to the owners     ``R W`` elements in float32 (float64 for float64)
    ========  ==========================  ================================================

Shapes of DeepSeek-V3, 128 heads: a latent has 576 elements, keys and values have 40,960.

Gradients: the latent's travel back; those of the weight are summed where keys and values are made,
over own and received tokens. Saved for the backward: q, latent, weight, output and lse; keys and
values are made again. Stages, order of sums, compilation and checkpoints
(``torch.ops.ring.latent_attention``) are those of :mod:`ring.attention`.

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lasp._core.autocast import autocast_inputs
from lasp.sequence.layout import SequenceLayout
from ring.attention import AttentionOptions, RingOutput, attend, shapes_of
from ring.torch_ops import LATENT_ATTENTION


def ring_latent_attention(
    q: Tensor,
    latent: Tensor,
    weight: Tensor,
    *,
    layout: SequenceLayout | None = None,
    cp_group: dist.ProcessGroup | None = None,
    causal: bool = True,
    window: tuple[int, int] | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    block: str = "auto",
) -> RingOutput:
    """:func:`ring.ring_attention` with keys and values made of a latent.

    With a latent ``[c, p]`` of R and P elements, and the first K and last V rows of the weight::

        k_h = [W_h[:K] c, p]      v_h = W_h[K:] c      for every head h

    Args:
        q: ``[T, H, K + P]``, the tokens of this rank; or ``[B, T, H, K + P]``, B rows under one
            layout of one document. float16, bfloat16, float32 or float64.
        latent: ``[T, R + P]`` or ``[B, T, R + P]``, dtype and device of ``q``. The last P elements,
            which may be none, are a part of every head's key, rotated where positions are.
        weight: ``[H, K + V, R]``, dtype and device of ``q``; the same on every rank.
        layout: see :func:`ring.ring_attention`, as the following.
        cp_group: the ranks that hold the pack. None: one rank.
        causal: a query sees itself and what comes before it in its document; else all of it.
        window: ``(left, right)``, how many tokens before and after itself a query sees at most.
        sinks: ``[H]``, a logit of each head that has no value.
        scale: factor of the scores, finite; None: 1 / sqrt(K + P).
        block: kernel, see :func:`ring.blocks.registry.resolve_block`.

    Returns:
        Output ``[T, H, V]`` or ``[B, T, H, V]``, and the lse.

    Gradients: to ``q``, ``latent``, ``weight`` and ``sinks``; every rank runs the backward. What a
    rank finds for ``weight`` and ``sinks`` is a part: sum it over the group.

    Communication: latents that other ranks' rows need, in the backward again with their gradients
    in float32.

    Raises:
        ValueError: as :func:`ring.ring_attention`.
    """
    q, latent, weight = autocast_inputs(q, latent, weight)
    _check_tensors(q, latent, weight)
    moving = latent.unsqueeze(1) if q.ndim == 3 else latent.transpose(0, 1)  # [T, B, R + P]
    options = AttentionOptions(layout, cp_group, causal, window, sinks, scale, block)
    return attend(LATENT_ATTENTION, q, moving, weight, options)


def _check_tensors(q: Tensor, latent: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless the shapes, dtypes and devices are those of one attention."""
    shapes = {"q": q.shape, "latent": latent.shape, "weight": weight.shape}
    if q.ndim not in (3, 4) or latent.ndim != q.ndim - 1 or weight.ndim != 3:
        raise ValueError(
            "q must be [T, H, K + P] or [B, T, H, K + P], latent [T, R + P] or [B, T, R + P] and"
            f" weight [H, K + V, R], got {shapes_of(shapes)}"
        )
    if 0 in (*q.shape, *latent.shape, *weight.shape):
        raise ValueError(f"q, latent and weight must not be empty, got {shapes_of(shapes)}")
    if q.shape[:-2] != latent.shape[:-1] or q.shape[-2] != weight.shape[0]:
        raise ValueError(
            "q must have the rows and tokens of latent and the heads of weight, got"
            f" {shapes_of(shapes)}"
        )
    shared = latent.shape[-1] - weight.shape[2]
    own = q.shape[-1] - shared
    if shared < 0 or not 0 <= own < weight.shape[1]:
        raise ValueError(
            "the last dims must be K + P of q, R + P of latent, and K + V and R of weight, with P"
            f" and K not negative and V positive, got {shapes_of(shapes)}: P {shared}, K {own}, V"
            f" {weight.shape[1] - own}"
        )
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if {latent.dtype, weight.dtype} != {q.dtype} or {latent.device, weight.device} != {q.device}:
        raise ValueError(
            "q, latent and weight must have one dtype and be on one device, got"
            f" {q.dtype}, {latent.dtype}, {weight.dtype} on {q.device}, {latent.device},"
            f" {weight.device}"
        )
