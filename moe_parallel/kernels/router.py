"""Launches of the router's kernels. Nothing here waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lasp._core.launcher import launch
from moe_parallel.kernels.gate_kernel import split_kernel, top_k_backward_kernel
from moe_parallel.kernels.histogram import Histogram
from moe_parallel.kernels.rows_kernel import (
    before_kernel,
    chunks_kernel,
    fitting_kernel,
    row_kernel,
    starts_kernel,
)
from moe_parallel.kernels.top_k_kernel import top_k_kernel

# Block sizes: all of these kernels are bound by memory.
SPLIT_BLOCK = 1024  # numbers of a program
ROUTER_TILE = 2048  # (token, expert) pairs that a program takes at a time
NUM_WARPS = 4
# With fewer the unrolled loads of the rows' kernel need more registers than there are.
ROW_WARPS = 8
MAX_PROGRAMS = 256  # two a multiprocessor; a power of 2: the scan of their counts is one tile
SCAN_COLUMNS = 4  # experts of a program of that scan
POSITIONS_TILE = 2048  # pairs of experts that are compared at a time
CHUNK_BLOCK, CHUNK_PARTS = 256, 4  # rows of a chunk at a time, and programs that share it


class ChoiceRule(NamedTuple):
    """How the kernels score, choose and weight, see :mod:`moe_parallel.router.scores`.

    Attributes:
        score: 0 for logits, 1 for sigmoid, 2 for softmax over all.
        normalize: weights are divided by their sum.
        scaling: of the weights, after that.
        num_groups: of experts; a power of 2, of as many experts each. 1: no groups.
        top_groups: from which a token chooses.
    """

    score: int = 0
    normalize: bool = True
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1


DEFAULT_RULE = ChoiceRule()


def split(x_NM: Tensor, *, pairs: bool = False) -> Tensor:
    """``[3 N, M]``: the bfloat16 parts of float32 numbers, the largest first, stacked.

    Or ``[6 N, M]`` for pairs: low, middle, high, middle, high, high, which meet those of
    :func:`top_k_backward`.
    """
    copies, size = 6 if pairs else 3, x_NM.numel()
    parts = x_NM.new_empty(copies * x_NM.shape[0], x_NM.shape[1], dtype=torch.bfloat16)
    launch(
        split_kernel, parts.device, -(-size // SPLIT_BLOCK),
        x_NM.contiguous(), parts, SIZE=size, PAIRS=pairs, BLOCK=SPLIT_BLOCK,
    )  # fmt: skip
    return parts


def top_k(
    product_TPE: Tensor,
    num_experts: int,
    top_k: int,
    rule: ChoiceRule = DEFAULT_RULE,
    bias_E: Tensor | None = None,
    num_ranks: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Histogram]:
    """The best experts of every token.

    Args:
        product_TPE: ``[T, P E]`` float32: logits as a sum of P parts, the smallest last.
        num_experts: E.
        top_k: k.
        rule: how they are scored, chosen and weighted.
        bias_E: ``[E]`` float32, added to the scores for the choice alone.
        num_ranks: P, ranks of as many experts each, whose tokens are counted; 0: none.

    Returns:
        Logits ``[T, E]``, experts ``[T, k]`` int64, weights ``[T, k]``, and the histogram.
    """
    product_TPE = product_TPE.contiguous()
    num_tokens, parts = product_TPE.shape[0], product_TPE.shape[1] // num_experts
    logits = product_TPE if parts == 1 else product_TPE.new_empty(num_tokens, num_experts)
    experts = product_TPE.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights = product_TPE.new_empty(num_tokens, top_k)
    span = tokens_of_program(num_tokens, num_experts)
    programs = -(-num_tokens // span)
    columns = num_experts + num_ranks
    before = product_TPE.new_empty(programs, columns, dtype=torch.int32)
    totals = product_TPE.new_empty(columns, dtype=torch.int64)
    launch(
        top_k_kernel,
        product_TPE.device,
        programs,
        *(product_TPE, None if parts == 1 else logits, experts, weights, before, bias_E),
        *(rule.scaling, num_tokens, span),
        E=num_experts, K=top_k, PARTS=parts, SCORE=rule.score, NORMALIZE=rule.normalize,
        PLAIN=rule.score == 0 and bias_E is None,
        GROUPS=rule.num_groups, TOP_GROUPS=rule.top_groups, RANKS=num_ranks,
        E_PAD=_power_of_2(num_experts), K_PAD=_power_of_2(top_k),
        RANKS_PAD=_power_of_2(num_ranks),
        TOKENS=tokens_at_a_time(num_experts),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    launch(
        before_kernel, before.device, -(-columns // SCAN_COLUMNS), before, totals, programs,
        E=columns, PROGRAMS=MAX_PROGRAMS, COLUMNS=SCAN_COLUMNS,
    )  # fmt: skip
    return logits, experts, weights, Histogram(before, totals, num_ranks)


def top_k_backward(
    grads: tuple[Tensor | None, Tensor | None],
    weights_Tk: Tensor,
    experts_Tk: Tensor,
    num_experts: int,
    *,
    parts: bool,
    pairs: bool = False,
    rule: ChoiceRule = DEFAULT_RULE,
    logits_TE: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits, ``[T, E]`` float32, or its bfloat16 parts side by side.

    Args:
        grads: gradients of the weights and of the logits, None for zeros.
        weights_Tk: result of :func:`top_k`.
        experts_Tk: result of :func:`top_k`.
        num_experts: E.
        parts: ``[T, 3 E]``, low, middle, high, in the place of their sum.
        pairs: ``[T, 6 E]``, high, middle, low, high, middle, high, which meet those of
            :func:`split`: the first half are all parts.
        rule: of :func:`top_k`.
        logits_TE: result of :func:`top_k`; of other scores than logits alone.
    """
    num_tokens, top_k = weights_Tk.shape
    copies, dtype = (6 if pairs else 3, torch.bfloat16) if parts else (1, torch.float32)
    grad = weights_Tk.new_empty(num_tokens, copies * num_experts, dtype=dtype)
    tokens = tokens_at_a_time(num_experts)
    dweights, dlogits = (None if g is None else g.contiguous() for g in grads)
    launch(
        top_k_backward_kernel,
        grad.device,
        -(-num_tokens // tokens),
        dweights,
        dlogits,
        weights_Tk,
        experts_Tk,
        logits_TE,
        grad,
        rule.scaling,
        num_tokens,
        E=num_experts,
        K=top_k,
        PARTS=parts,
        PAIRS=pairs,
        SCORE=rule.score,
        NORMALIZE=rule.normalize,
        E_PAD=_power_of_2(num_experts),
        TOKENS=tokens,
        num_warps=NUM_WARPS,
    )
    return grad


def rows(
    experts_Tk: Tensor,
    histogram: Histogram,
    positions_E: Tensor | None = None,
    starts_E: Tensor | None = None,
    *,
    with_ends: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``[T, k]`` and ``[T, P]`` int64: the row of each assignment, and of each token and rank.

    And ``[E]`` int32, where the rows of each expert end, or None.

    Args:
        experts_Tk: chosen experts.
        histogram: of the same assignments.
        positions_E: the position of each expert in the order of the rows; None: its number.
        starts_E: the first row of each expert, in the place of what precedes it in that order.
        with_ends: count the ends too; not without tokens, where no program runs, nor of experts
            that have positions or starts.
    """
    (num_tokens, top_k), num_ranks = experts_Tk.shape, histogram.num_ranks
    num_experts = histogram.totals.shape[0] - num_ranks
    row = torch.empty_like(experts_Tk, memory_format=torch.contiguous_format)
    token_row = row.new_empty(num_tokens, num_ranks)
    padded, programs = _power_of_2(num_experts), histogram.before.shape[0]
    with_ends = with_ends and programs > 0 and positions_E is None and starts_E is None
    ends = row.new_empty(num_experts, dtype=torch.int32) if with_ends else None
    launch(
        row_kernel, row.device, programs, experts_Tk.contiguous(),
        *(histogram.before, histogram.totals, positions_E, starts_E, row, token_row, ends),
        *(num_tokens, tokens_of_program(num_tokens, num_experts)),
        E=num_experts, K=top_k, RANKS=num_ranks,
        E_PAD=padded, K_PAD=_power_of_2(top_k), RANKS_PAD=_power_of_2(num_ranks),
        OTHERS=min(padded, max(1, POSITIONS_TILE // padded)),
        TOKENS=tokens_at_a_time(num_experts),
        num_warps=ROW_WARPS,
    )  # fmt: skip
    return row, token_row, ends


def starts(
    kept_RE: Tensor, sources: Tensor, me: int, ep_rank: int, ep_size: int
) -> tuple[Tensor, Tensor]:
    """``[E]`` int64 and ``[E_local]`` int32: see ``rows_kernel.starts_kernel``.

    Args:
        kept_RE: int64, rows of each rank for each expert; neighbouring experts lie side by side.
        sources: int64, the ranks whose rows this rank's experts take.
        me: this rank among them.
        ep_rank: this rank in the EP group.
        ep_size: of the EP group.
    """
    num_local = kept_RE.shape[1] // ep_size
    starts_E = kept_RE.new_empty(kept_RE.shape[1])
    ends = kept_RE.new_empty(num_local, dtype=torch.int32)
    launch(
        starts_kernel, ends.device, ep_size,
        kept_RE, kept_RE.stride(0), sources, starts_E, ends, me, ep_rank,
        S=len(sources), E_LOCAL=num_local, E_PAD=_power_of_2(num_local),
    )  # fmt: skip
    return starts_E, ends


def fitting(assigned_RE: Tensor, ep_size: int, memory: int) -> tuple[Tensor, Tensor]:
    """See :func:`moe_parallel.dispatch.static_rows.fitting_rows`; experts lie side by side."""
    num_ranks, num_experts = assigned_RE.shape
    kept = assigned_RE.new_empty(num_ranks, num_experts)
    wanted, num_local = assigned_RE.new_empty(num_ranks), num_experts // ep_size
    launch(
        fitting_kernel, kept.device, num_ranks,
        assigned_RE, assigned_RE.stride(0), kept, wanted, memory,
        EP=ep_size, E_LOCAL=num_local, E_PAD=_power_of_2(num_local),
    )  # fmt: skip
    return kept, wanted


def chunks(
    counts_RE: Tensor, sources: Tensor, first: int, num_experts: int, num_rows: int | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """``[A]`` int64 twice and ``[N]`` int32: see ``rows_kernel.chunks_kernel``.

    Args:
        counts_RE: int64, rows of each rank for each expert; neighbouring experts lie side by side.
        sources: int64, the ranks whose rows arrive.
        first: number of the first expert.
        num_experts: N, from it on.
        num_rows: A, that arrive; None: only where they end is asked for.
    """
    order = [None if num_rows is None else counts_RE.new_empty(num_rows) for _ in range(2)]
    ends = counts_RE.new_empty(num_experts, dtype=torch.int32)
    num_sources, parts = len(sources), 1 if num_rows is None else CHUNK_PARTS
    launch(
        chunks_kernel, ends.device, num_sources * num_experts * parts,
        counts_RE, counts_RE.stride(0), sources, *order, ends, first,
        S=num_sources, N=num_experts, S_PAD=_power_of_2(num_sources),
        N_PAD=_power_of_2(num_experts), PARTS=parts, BLOCK=CHUNK_BLOCK,
    )  # fmt: skip
    return order[0], order[1], ends


def tokens_at_a_time(num_experts: int) -> int:
    """Tokens that a program takes at a time."""
    return max(1, ROUTER_TILE // _power_of_2(num_experts))


def tokens_of_program(num_tokens: int, num_experts: int) -> int:
    """A multiple of :func:`tokens_at_a_time`, so that programs are few."""
    chunk = tokens_at_a_time(num_experts)
    return chunk * max(1, -(-num_tokens // (chunk * MAX_PROGRAMS)))


def _power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
