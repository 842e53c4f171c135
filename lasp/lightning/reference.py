"""The oracle: lightning attention one token at a time, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lasp._core.dtypes import wide_dtype


def recurrent_lightning_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THV: Tensor,
    rates_H: Tensor,
    *,
    cu_seqlens: Sequence[int] | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``S_t = exp(-rate) S_{t-1} + k_t^T v_t;  o_t = scale q_t S_t``, S reset at each document.

    The definition of what the fast paths compute; slow. The state is kept in the dtype of ``q``, at
    least fp32.

    Args:
        q_THK: queries ``[T, H, K]``, any floating dtype.
        k_THK: keys ``[T, H, K]``.
        v_THV: values ``[T, H, V]``.
        rates_H: decay rates ``[H]``.
        cu_seqlens: N + 1 cumulative document lengths; one document of T tokens by default.
        scale: factor of the output.
        initial_state: state before the first token of each document ``[N, H, K, V]``; else 0.

    Returns:
        output ``[T, H, V]`` in the dtype of ``q`` and final states ``[N, H, K, V]``; the final
        state of an empty document is its initial state.

    Gradients: to every tensor argument, by autograd.
    """
    output_dtype = q_THK.dtype
    dtype = wide_dtype(output_dtype)
    q_THK, k_THK, v_THV = q_THK.to(dtype), k_THK.to(dtype), v_THV.to(dtype)
    decay_H11 = torch.exp(-rates_H.to(dtype))[:, None, None]
    borders = (0, q_THK.shape[0]) if cu_seqlens is None else cu_seqlens
    outputs, final_states = [], []
    for document, (start, stop) in enumerate(pairwise(borders)):
        if initial_state is None:
            state_HKV = q_THK.new_zeros(*k_THK.shape[1:], v_THV.shape[2])
        else:
            state_HKV = initial_state[document].to(dtype)
        for t in range(start, stop):
            state_HKV = decay_H11 * state_HKV + k_THK[t].unsqueeze(2) * v_THV[t].unsqueeze(1)
            outputs.append(scale * (q_THK[t].unsqueeze(1) @ state_HKV).squeeze(1))
        final_states.append(state_HKV)
    return torch.stack(outputs).to(output_dtype), torch.stack(final_states)
