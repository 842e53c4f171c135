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

- :func:`run_states` (A): what each run adds to the state it sends on.
- the exchange (B), in ``lasp.state_exchange``.
- :func:`scan` (C): the output, from the states that are known locally, and
  :func:`add_incoming`: the part of the output that comes from a state received meanwhile.

Everything is computed in the dtype of ``rates`` (fp32, or fp64 for fp64 inputs), whatever the dtype
of the operands; matrix products follow ``torch.set_float32_matmul_precision``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lasp.sequence.state_flow import Flow, Piece

CHUNK = 64
# Chunks computed at once: few torch calls, and temporaries bounded by GROUP states a head.
GROUP = 16


def run_states(
    key_THK: Tensor, value_THV: Tensor, rates_H: Tensor, flow: Flow, *, given: Tensor | None
) -> Tensor:
    """Pass A: the local part of the state that each sending run hands on.

    The decayed sum of ``key^T value`` over the fragment at the border, plus the decayed given state
    if the document starts in it. What a run receives and passes on is the exchange's part.

    Args:
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]``, in the dtype to compute in.
        flow: direction and fragments.
        given: state at the start of each document ``[N, H, K, V]``, or None for zero.

    Returns:
        ``[flow.num_slots, H, K, V]``; slots that this rank does not use are zero.
    """
    states = rates_H.new_zeros(flow.num_slots, *key_THK.shape[1:], value_THV.shape[2])
    for slot, piece in enumerate(piece for piece in flow.pieces if piece.sends):
        key_HnK, value_HnV = (_heads_first(x, piece, rates_H) for x in (key_THK, value_THV))
        leaving_Hn1 = _leaving(rates_H, piece.length, flow.reverse)
        states[slot] = (key_HnK * leaving_Hn1).mT @ value_HnV
        if given is not None and piece.document is not None and not piece.receives:
            states[slot].addcmul_(decay_over(rates_H, piece.length), given[piece.document])
    return states


def scan(
    query_THK: Tensor,
    key_THK: Tensor,
    value_THV: Tensor,
    rates_H: Tensor,
    flow: Flow,
    *,
    given: Tensor | None,
    incoming: Tensor | None = None,
    with_result: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Pass C: the output of every token, fragment by fragment, chunk by chunk.

    Chunks are counted from the start of the fragment and operands are copied before they are used,
    so that a document takes the same sequence of operations, and gets the same bits, whatever else
    is in the pack.

    Args:
        query_THK: ``[T, H, K]``.
        key_THK: ``[T, H, K]``.
        value_THV: ``[T, H, V]``.
        rates_H: ``[H]``, in the dtype to compute in.
        flow: direction and fragments.
        given: state at the start of each document ``[N, H, K, V]``, or None for zero.
        incoming: states that runs receive ``[runs of this rank, H, K, V]``; None where they are
            not known yet: :func:`add_incoming` then adds their part.
        with_result: return what the documents that end here leave.

    Returns:
        output ``[T, H, V]`` in the dtype of the rates, and ``[N, H, K, V]``, zero for documents
        that end elsewhere (or None).
    """
    num_tokens, num_heads, key_dim = query_THK.shape
    state_shape = (num_heads, key_dim, value_THV.shape[2])
    output = rates_H.new_empty(num_tokens, num_heads, value_THV.shape[2])
    result = rates_H.new_zeros(flow.num_documents, *state_shape) if with_result else None
    decay = _chunk_decay(rates_H, flow.reverse)
    for piece in flow.pieces:
        state_HKV = rates_H.new_zeros(state_shape)
        if piece.receives:
            if incoming is not None:
                state_HKV = incoming[piece.run]
        elif given is not None and piece.document is not None:
            state_HKV = given[piece.document]
        for offset, count, length in _chunk_groups(piece, flow.reverse):
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
        if result is not None and piece.document is not None and not piece.sends:
            result[piece.document] = state_HKV
    if result is not None and given is not None:
        for document in flow.empty_documents:
            result[document] = given[document]
    return output, result


def add_incoming(
    output_THV: Tensor,
    query_THK: Tensor,
    rates_H: Tensor,
    flow: Flow,
    incoming: Tensor,
    *,
    result: Tensor | None = None,
) -> None:
    """Add in place what a received state contributes to the fragment at the border.

    Args:
        output_THV: the output of :func:`scan` ``[T, H, V]``.
        query_THK: ``[T, H, K]``.
        rates_H: ``[H]``.
        flow: direction and fragments.
        incoming: received states ``[runs of this rank, H, K, V]``.
        result: the results of :func:`scan` ``[N, H, K, V]``, for documents that end right here.
    """
    for piece in flow.pieces:
        if piece.receives:
            query_HnK = _heads_first(query_THK, piece, rates_H)
            entering_Hn1 = _entering(rates_H, piece.length, flow.reverse)
            tokens = slice(piece.offset, piece.offset + piece.length)
            output_THV[tokens] += ((query_HnK * entering_Hn1) @ incoming[piece.run]).transpose(0, 1)
            if result is not None and piece.document is not None and not piece.sends:
                decay_H11 = decay_over(rates_H, piece.length)
                result[piece.document].addcmul_(decay_H11, incoming[piece.run])


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


def _chunk_groups(piece: Piece, reverse: bool) -> Iterator[tuple[int, int, int]]:
    """(offset, chunks, tokens a chunk) of chunks computed at once, in the order of the flow."""
    full, tail = divmod(piece.length, CHUNK)
    groups = [
        (piece.offset + first * CHUNK, min(GROUP, full - first), CHUNK)
        for first in range(0, full, GROUP)
    ]
    if tail:
        groups.append((piece.offset + full * CHUNK, 1, tail))
    return reversed(groups) if reverse else iter(groups)


def _chunks(x_THD: Tensor, count: int, like: Tensor) -> Tensor:
    """``[c C, H, D]`` -> ``[c, H, C, D]``, a contiguous copy in the dtype to compute in."""
    x_cHCD: Tensor = x_THD.unflatten(0, (count, -1)).transpose(1, 2)
    return x_cHCD.to(like.dtype, copy=True, memory_format=torch.contiguous_format)


def _heads_first(x_THD: Tensor, piece: Piece, like: Tensor) -> Tensor:
    """The piece's tokens ``[H, n, D]``, a contiguous copy in the dtype to compute in."""
    x_nHD = x_THD[piece.offset : piece.offset + piece.length]
    return x_nHD.transpose(0, 1).to(like.dtype, copy=True, memory_format=torch.contiguous_format)
