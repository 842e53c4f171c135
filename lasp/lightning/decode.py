"""Generation: the next tokens of every sequence of a batch, from its state.

Per head, with ``lambda = exp(-rate)``: ``S = lambda S + k^T v``, ``o = scale q S``, a token at a
time. The state is all that a sequence needs of its past, so a token costs the same after a thousand
tokens as after a million. Prompts of any lengths, and new tokens beside them, are documents of a
pack with initial states: :func:`lasp.lightning_attention` takes those in one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lasp._core.autocast import autocast_inputs
from lasp._core.derivatives import Reference, refuse_forward_mode
from lasp._core.dtypes import wide_dtype
from lasp._core.impl import Impl, chosen_impl
from lasp.lightning.attention import LightningOutput
from lasp.lightning.decay import rates_on
from lasp.lightning.validation import check_qkv, unserved

_TRITON = Reference("lightning_decode with impl='triton'", "impl='eager'")
_RATES = Reference(
    "lightning_decode of its rates", "lasp.lightning.reference.recurrent_lightning_attention"
)


def lightning_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    state: Tensor,
    *,
    scale: float = 1.0,
    in_place: bool = False,
    slots: Tensor | None = None,
    impl: Impl = "auto",
) -> LightningOutput:
    """Lightning attention of the next tokens of each sequence, given the states before them.

    ``S_t = exp(-rate) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t``, for each sequence and head. To
    decode drafts pass all drafted tokens out of place, and those that are accepted again.

    Args:
        q: queries ``[B, T, H, K]`` of the T next tokens (one, or a few) of B sequences, oldest
            first. bf16, fp16, fp32 or fp64; any strides. Under autocast q, k and v are cast to its
            dtype; states stay float32.
        k: keys, as ``q``.
        v: values ``[B, T, H, V]``.
        rates: decay rates ``[H]``, float32 or float64, see ``decay_rates``. From the CPU they are
            checked, copied once and remembered by value; on the device of ``q`` they are used as
            they are, for a look at them would wait for the device.
        state: states before these tokens ``[B, H, K, V]``, float32, or float64 with fp64 inputs.
        scale: factor of the output.
        in_place: leave the new states in ``state``, which must then be contiguous.
        slots: int64 ``[B]`` on the device of ``q``, with ``in_place``: which of the S states
            ``[S, H, K, V]`` each sequence has, each at most once; -1 is padding, whose output means
            nothing and which changes no state. None: B states, in order.
        impl: ``eager``, plain torch; ``triton``, one kernel for GPUs that reads and writes each
            state once: bf16, fp16 or fp32, K and V up to 256; ``auto``, ``triton`` where it can,
            see ``lasp._core.impl``.

    Returns:
        The output ``[B, T, H, V]``, like ``q``, and the states after: ``state`` if ``in_place``.

    Gradients: none.

    Raises:
        ValueError: naming the argument, also for inputs that ask for gradients.

    Source: Lightning Attention-2, arXiv:2401.04658, inference.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_qkv(q, k, v)
    _check_step(q, k, v, rates, state, in_place)
    _check_slots(q, v, state, slots, in_place)
    if chosen_impl(impl, q.device, q.dtype, unserved(q, v)) == "triton":
        refuse_forward_mode(_TRITON, q, k, v, rates, state)
        from lasp.lightning.triton import decode as fused

        if not in_place:
            return LightningOutput(*fused.call(q, k, v, rates, state, scale))
        return LightningOutput(fused.call_(q, k, v, rates, state, slots, scale), state)
    if slots is not None:
        return _decode_slots(q, k, v, rates, state, slots, scale)
    return _decode(q, k, v, rates, state if in_place else state.clone(), scale)


def _decode_slots(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, slots: Tensor, scale: float
) -> LightningOutput:
    """In plain torch and in place, each sequence in its slot."""
    rows, used = state[slots.clamp(min=0)], slots >= 0
    output, _ = _decode(q, k, v, rates, rows, scale)
    state[slots[used]] = rows[used]
    return LightningOutput(output, state)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, new_state: Tensor, scale: float
) -> LightningOutput:
    """In plain torch; ``new_state`` is the old one, and changed."""
    refuse_forward_mode(_RATES, rates)
    decay_H11 = torch.exp(-rates_on(rates, q.device, new_state.dtype))[:, None, None]
    outputs = []
    with torch.autocast(q.device.type, enabled=False):  # states and what reads them stay wide
        for q_BHK, k_BHK, v_BHV in zip(*(x.to(new_state.dtype).unbind(1) for x in (q, k, v))):
            new_state.mul_(decay_H11).addcmul_(k_BHK.unsqueeze(3), v_BHV.unsqueeze(2))
            outputs.append(scale * (q_BHK.unsqueeze(2) @ new_state).squeeze(2))
    return LightningOutput(torch.stack(outputs, dim=1).to(q.dtype), new_state)


def _check_step(
    q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor, in_place: bool
) -> None:
    """Raise ValueError for what does not belong together; values are not looked at."""
    if q.dim() != 4:
        raise ValueError(
            f"q must be [B, T, H, K], T new tokens a sequence, got {tuple(q.shape)}: for one token"
            " a sequence, T = 1, use q.unsqueeze(1)"
        )
    if rates.shape != q.shape[2:3] or rates.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rates must be [{q.shape[2]}], float32 or float64, got {tuple(rates.shape)} in"
            f" {rates.dtype}: see decay_rates"
        )
    if rates.device.type != "cpu" and rates.device != q.device:
        raise ValueError(
            f"rates must be on the CPU or the device of q, {q.device}, got {rates.device}: move"
            " them with rates.to(q.device), or leave them on the CPU"
        )
    if in_place and not state.is_contiguous():
        raise ValueError(
            f"state must be contiguous to be changed in place, got strides {state.stride()}: keep"
            " the states of a layer in one piece"
        )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, state)):
        raise ValueError(
            "q, k, v and state must not require grad, decoding has no backward: call it under"
            " torch.no_grad(), or train with lightning_attention"
        )


def _check_slots(q: Tensor, v: Tensor, state: Tensor, slots: Tensor | None, in_place: bool) -> None:
    """Raise ValueError unless there is a state for each sequence."""
    batch, _, num_heads, key_dim = q.shape
    if slots is not None:
        if not in_place:
            raise ValueError("slots need in_place=True, got False: they say what changes where")
        if slots.shape != (batch,) or slots.dtype != torch.int64 or slots.device != q.device:
            raise ValueError(
                f"slots must be int64 [{batch}] on {q.device}, one a sequence, got {slots.dtype} of"
                f" {list(slots.shape)} on {slots.device}"
            )
        batch = len(state)
    shape = batch, num_heads, key_dim, v.shape[3]
    if state.shape != shape or state.dtype != wide_dtype(q.dtype) or state.device != q.device:
        raise ValueError(
            f"state must be {shape} in {wide_dtype(q.dtype)} on {q.device}, got"
            f" {tuple(state.shape)} in {state.dtype} on {state.device}: start from zeros of that"
            " shape, or from the final_state of lightning_attention, [documents, H, K, V]"
        )
