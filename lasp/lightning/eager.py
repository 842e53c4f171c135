"""Local compute of lightning attention in plain torch: the tokens of one rank, one direction.

The recurrence in one direction, per head, with ``lambda = exp(-rate)``::

    forward   S_t = lambda S_{t-1} + k_t^T v_t        o_t = q_t S_t
    reverse   S_t = lambda S_{t+1} + k_t^T v_t        o_t = q_t S_t

q, k and v are *roles* (query, key, value). The forward output is the forward scan of (q, k, v);
with ``do`` the gradient of the output, the gradients are the same scan in other roles::

    dq = forward (do, v, k)        dv = reverse (k, q, do)        dk = reverse (v, do, q)

the last two carrying dS and its transpose, first and last with the states of the forward scan.

Decay towards a border differs between the directions: a state that enters a fragment of n tokens
has decayed by ``lambda^(i+1)`` at token i in the forward scan, while the gradient of the state
*after* token n-1 has not yet decayed there: ``lambda^(n-1-i)``. The weights with which tokens enter
the outgoing state are the same two, exchanged. So reversing time means: swap them, transpose the
causal mask, walk backwards.

Three passes, as the Triton kernels have them:

- :func:`chunk_state`: what each run adds to the state that it sends on.
- state passing: the exchange of these states between ranks, in ``lasp.state_exchange``.
- :func:`chunk_scan`: the output, from the states that are known locally. :func:`add_incoming` then
  adds what a state contributes that was received meanwhile.

Everything is computed in the dtype of ``rates`` (fp32, or fp64 for fp64 inputs), whatever the dtype
of the operands; matrix products follow ``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.sequence.state_flow import DirectedFragment, StateFlow

CHUNK = 64
# Chunks computed at once: few torch calls, and temporaries bounded by GROUP states a head.
GROUP = 16


def chunk_state(
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    flow: StateFlow,
    *,
    initial_state: Tensor | None,
) -> Tensor:
    """The local part of the state that each sending run hands on.

    The decayed sum of ``key^T value`` over the fragment at the border, plus the decayed initial
    state if the document starts in it. The exchange adds what a run receives and passes on.

    Args:
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]``, in the dtype to compute in.
        flow: direction and fragments.
        initial_state: state at the start of each document ``[N, H, K, V]``, or None for zero.

    Returns:
        ``[flow.num_slots, H, K, V]``; slots that this rank does not use are zero.
    """
    states = rates_H.new_zeros(flow.num_slots, *key_THK.shape[1:], value_THV.shape[2])
    for slot, fragment in enumerate(fragment for fragment in flow.fragments if fragment.sends):
        key_HnK, value_HnV = (_heads_first(x, fragment, rates_H) for x in (key_THK, value_THV))
        leaving_Hn1 = _leaving(rates_H, fragment.length, flow.reverse)
        states[slot] = (key_HnK * leaving_Hn1).mT @ value_HnV
        if initial_state is not None and fragment.document is not None and not fragment.receives:
            states[slot].addcmul_(
                decay_over(rates_H, fragment.length), initial_state[fragment.document]
            )
    return states


def chunk_scan(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    flow: StateFlow,
    *,
    initial_state: Tensor | None,
    incoming: Tensor | None = None,
    with_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The output of every token, fragment by fragment, chunk by chunk.

    Chunks are counted from the start of the fragment and operands are copied before they are used,
    so that a document takes the same sequence of operations, and gets the same bits, whatever else
    is in the pack.

    Args:
        query_THK: ``[T, H, K]``.
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]``, in the dtype to compute in.
        flow: direction and fragments.
        initial_state: state at the start of each document ``[N, H, K, V]``, or None for zero.
        incoming: states that runs receive ``[runs of this rank, H, K, V]``; None where they are
            not known yet: :func:`add_incoming` then adds their part.
        with_final_state: return the states of the documents that end here.

    Returns:
        output ``[T, H, V]`` in the dtype of the rates, and ``[N, H, K, V]``, zero for documents
        that end elsewhere (or None).
    """
    num_tokens, num_heads, key_dim = query_THK.shape
    state_shape = (num_heads, key_dim, value_THV.shape[2])
    output = rates_H.new_empty(num_tokens, num_heads, value_THV.shape[2])
    final_state = rates_H.new_zeros(flow.num_documents, *state_shape) if with_final_state else None
    decay = _chunk_decay(rates_H, flow.reverse)
    for fragment in flow.fragments:
        state_HKV = _entry_state(fragment, initial_state, incoming)
        if state_HKV is None:
            state_HKV = rates_H.new_zeros(state_shape)
        for offset, count, length in _chunk_groups(fragment, flow.reverse):
            tokens = slice(offset, offset + count * length)
            output_cHCV, state_HKV = _scan_chunks(
                _chunks(query_THK[tokens], count, rates_H),
                _chunks(key_THK[tokens], count, rates_H),
                _chunks(value_THV[tokens], count, rates_H),
                state_HKV,
                decay.of_length(length, flow.reverse),
                flow.reverse,
            )
            output[tokens].unflatten(0, (count, length)).copy_(output_cHCV.transpose(1, 2))
        if final_state is not None and fragment.document is not None and not fragment.sends:
            final_state[fragment.document] = state_HKV
    if final_state is not None and initial_state is not None:
        for document in flow.empty_documents:
            final_state[document] = initial_state[document]
    return output, final_state


def add_incoming(
    output_THV: Tensor,
    query_THK: Tensor,
    rates_H: Tensor,
    flow: StateFlow,
    incoming: Tensor,
    *,
    final_state: Tensor | None = None,
) -> None:
    """Add in place what a received state contributes to the fragment at the border.

    Args:
        output_THV: the output of :func:`chunk_scan` ``[T, H, V]``.
        query_THK: ``[T, H, K]``.
        rates_H: ``[H]``.
        flow: direction and fragments.
        incoming: received states ``[runs of this rank, H, K, V]``.
        final_state: that of :func:`chunk_scan` ``[N, H, K, V]``, for documents that end here.
    """
    for fragment in flow.fragments:
        if fragment.receives:
            query_HnK = _heads_first(query_THK, fragment, rates_H)
            entering_Hn1 = _entering(rates_H, fragment.length, flow.reverse)
            tokens = slice(fragment.offset, fragment.offset + fragment.length)
            output_THV[tokens] += ((query_HnK * entering_Hn1) @ incoming[fragment.run]).transpose(
                0, 1
            )
            if final_state is not None and fragment.document is not None and not fragment.sends:
                decay_H11 = decay_over(rates_H, fragment.length)
                final_state[fragment.document].addcmul_(decay_H11, incoming[fragment.run])


def _entry_state(
    fragment: DirectedFragment, initial_state: Tensor | None, incoming: Tensor | None
) -> Tensor | None:
    """The state before a fragment as far as it is known; None for zero."""
    if fragment.receives:
        return None if incoming is None else incoming[fragment.run]
    if initial_state is None or fragment.document is None:
        return None
    return initial_state[fragment.document]


def decay_over(rates_H: Tensor, length: int) -> Tensor:
    """``lambda^length``, ``[H, 1, 1]``: the transition of a state over ``length`` tokens."""
    return torch.exp(rates_H * -float(length))[:, None, None]


class _ChunkDecay(NamedTuple):
    """Decay within one chunk of C tokens, in the direction of the flow."""

    within: Tensor  # [H, C, C] lambda^|i - j| from token j to token i, 0 against the flow
    entering: Tensor  # [H, C, 1] from the border where the state enters, to token i
    leaving: Tensor  # [H, C, 1] from token j to the border where the state leaves
    across: Tensor  # [H, 1, 1] from border to border

    def of_length(self, length: int, reverse: bool) -> _ChunkDecay:
        """The decay within a shorter chunk, as parts of this one."""
        chunk = self.within.shape[1]
        if length == chunk:
            return self
        powers_HC1 = self.leaving if reverse else self.entering  # lambda^1 .. lambda^C
        rising, falling = slice(0, length), slice(chunk - length, chunk)
        entering, leaving = (falling, rising) if reverse else (rising, falling)
        return _ChunkDecay(
            self.within[:, :length, :length],
            self.entering[:, entering],
            self.leaving[:, leaving],
            powers_HC1[:, length - 1 : length],
        )


def _chunk_decay(rates_H: Tensor, reverse: bool) -> _ChunkDecay:
    position = torch.arange(CHUNK, device=rates_H.device)
    distance_CC = position[:, None] - position[None, :]
    if reverse:
        distance_CC = -distance_CC
    # The mask comes before the exponential: against the flow it would overflow.
    exponent_CC = distance_CC.clamp(min=0).to(rates_H.dtype)
    within_HCC = torch.exp(-rates_H[:, None, None] * exponent_CC) * (distance_CC >= 0)
    return _ChunkDecay(
        within_HCC,
        _entering(rates_H, CHUNK, reverse),
        _leaving(rates_H, CHUNK, reverse),
        decay_over(rates_H, CHUNK),
    )


def _entering(rates_H: Tensor, length: int, reverse: bool) -> Tensor:
    """Decay of an incoming state up to each token, ``[H, length, 1]``: never above 1."""
    exponent = torch.arange(1, length + 1, device=rates_H.device, dtype=rates_H.dtype)
    if reverse:
        exponent = length - exponent
    return torch.exp(-rates_H[:, None] * exponent).unsqueeze(2)


def _leaving(rates_H: Tensor, length: int, reverse: bool) -> Tensor:
    """Weight of each token in the outgoing state, ``[H, length, 1]``: never above 1."""
    return _entering(rates_H, length, not reverse)


def _scan_chunks(
    query_cHCK: Tensor,
    key_cHCK: Tensor,
    value_cHCV: Tensor,
    state_HKV: Tensor,
    decay: _ChunkDecay,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Output of c consecutive chunks of one length, and the state after them."""
    added_cHKV = (key_cHCK * decay.leaving).mT @ value_cHCV
    entry_cHKV = torch.empty_like(added_cHKV)  # the state that enters each chunk
    count = added_cHKV.shape[0]
    for chunk in reversed(range(count)) if reverse else range(count):
        entry_cHKV[chunk] = state_HKV
        state_HKV = torch.addcmul(added_cHKV[chunk], decay.across, state_HKV)
    scores_cHCC = (query_cHCK @ key_cHCK.mT).mul_(decay.within)
    output_cHCV = scores_cHCC @ value_cHCV
    output_cHCV += (query_cHCK * decay.entering) @ entry_cHKV
    return output_cHCV, state_HKV


def _chunk_groups(fragment: DirectedFragment, reverse: bool) -> Iterator[tuple[int, int, int]]:
    """(offset, chunks, tokens a chunk) of chunks computed at once, in the order of the flow."""
    full, tail = divmod(fragment.length, CHUNK)
    groups = [
        (fragment.offset + first * CHUNK, min(GROUP, full - first), CHUNK)
        for first in range(0, full, GROUP)
    ]
    if tail:
        groups.append((fragment.offset + full * CHUNK, 1, tail))
    return reversed(groups) if reverse else iter(groups)


def _chunks(x_THD: Tensor, count: int, like: Tensor) -> Tensor:
    """``[c C, H, D]`` -> ``[c, H, C, D]``, a contiguous copy in the dtype to compute in."""
    x_cHCD: Tensor = x_THD.unflatten(0, (count, -1)).transpose(1, 2)
    return x_cHCD.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def _heads_first(x_THD: Tensor, fragment: DirectedFragment, like: Tensor) -> Tensor:
    """The fragment's tokens ``[H, n, D]``, a contiguous copy in the dtype to compute in."""
    x_nHD = x_THD[fragment.offset : fragment.offset + fragment.length]
    return x_nHD.transpose(0, 1).to(like.dtype, copy=True, memory_format=torch.contiguous_format)
