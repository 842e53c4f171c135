"""The experts of one rank: SwiGLU feed-forward networks over rows grouped by expert."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Gemm = Literal["auto", "loop", "grouped"]

GROUPED_ALIGNMENT_BYTES = 16  # grouped_mm rejects rows whose stride is no multiple of this


class ShardedDims(NamedTuple):
    """How a parameter is cut: its dimension split over EP and the one split over ETP."""

    ep_dim: int
    etp_dim: int


class Experts(nn.Module):
    """This rank's part of E SwiGLU experts: rows in, rows out, no communication.

    Row x of expert e: y = w2[e] (silu(w13[e, 0] x) * w13[e, 1] x). With ``etp_size`` > 1 each rank
    holds F / etp_size of the FFN dimension, and y is this rank's term of the sum over ETP.

    Parameters: ``w13`` ``[E_local, 2, F_local, hidden]`` (gate, up), ``w2``
    ``[E_local, hidden, F_local]``; :meth:`sharding` tells how they are cut out of the whole.

    Args:
        hidden_size: width of a row.
        ffn_size: F, of a whole expert.
        num_experts: E, on all EP ranks; EP rank r holds experts r E_local to (r + 1) E_local - 1.
        ep_rank: this rank in the EP group.
        ep_size: EP ranks.
        etp_rank: this rank in the ETP group.
        etp_size: ETP ranks.
        gemm: ``loop``, one matrix product an expert, any dtype; ``grouped``, one
            ``torch.nn.functional.grouped_mm`` for all experts, not float64, rows of 16-byte
            multiples; ``auto``, grouped for bfloat16 on CUDA with such rows, else loop.
        device: of the parameters.
        dtype: of the parameters.

    The parameters are uninitialised until :meth:`reset_parameters` or a checkpoint fills them.

    Raises:
        ValueError: naming the argument, if the sizes do not divide or ``gemm`` cannot run.
    """

    # The shard of a mesh position, a device and a dtype: past 8 parameters, but each one plain.
    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        *,
        ep_rank: int = 0,
        ep_size: int = 1,
        etp_rank: int = 0,
        etp_size: int = 1,
        gemm: Gemm = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_experts % ep_size:
            raise ValueError(
                f"num_experts must divide over the ep group, got {num_experts} experts"
                f" over {ep_size} ranks"
            )
        if ffn_size % etp_size:
            raise ValueError(
                f"ffn_size must divide over the etp group, got {ffn_size} over {etp_size} ranks"
            )
        if gemm not in get_args(Gemm):
            raise ValueError(f"gemm must be one of {get_args(Gemm)}, got {gemm!r}")
        self.hidden_size, self.ffn_size, self.num_experts = hidden_size, ffn_size, num_experts
        self.ep_rank, self.etp_rank = ep_rank, etp_rank
        self.num_local, self.ffn_local = num_experts // ep_size, ffn_size // etp_size
        self.gemm: Gemm = gemm
        shape_w13 = (self.num_local, 2, self.ffn_local, hidden_size)
        shape_w2 = (self.num_local, hidden_size, self.ffn_local)
        self.w13 = nn.Parameter(torch.empty(shape_w13, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(shape_w2, device=device, dtype=dtype))
        self.chosen_gemm()  # raises here, not between two collectives

    @staticmethod
    def sharding() -> dict[str, ShardedDims]:
        """For each parameter the dimensions cut over EP and ETP, in equal blocks in rank order."""
        return {"w13": ShardedDims(ep_dim=0, etp_dim=2), "w2": ShardedDims(ep_dim=0, etp_dim=2)}

    @torch.no_grad()
    def reset_parameters(self, seed: int, *, gain: float = 1.0) -> None:
        """Fill with Xavier normal values that depend on (seed, expert) alone, not on the mesh.

        Each local expert is drawn whole, in float32 on the CPU, from a generator of its own, and
        the ETP part is cut out of it: 3 x F x hidden samples an expert and rank, ``etp_size``
        times what is kept. Parameters on the meta device are left alone.

        Args:
            seed: the same on every rank; give every layer another.
            gain: factor of the standard deviation sqrt(2 / (fan_in + fan_out)).
        """
        if self.w13.is_meta:
            return
        std = gain * math.sqrt(2 / (self.hidden_size + self.ffn_size))
        # Seeds by lot, so that expert e + 1 under one seed is not expert e under the next.
        lots = torch.randint(
            2**63 - 1, (self.num_experts,), generator=generator_of(seed), device="cpu"
        ).tolist()
        part = slice(self.etp_rank * self.ffn_local, (self.etp_rank + 1) * self.ffn_local)
        for local in range(self.num_local):
            lot = lots[self.ep_rank * self.num_local + local]
            generator = generator_of(lot)
            w13 = torch.empty(2, self.ffn_size, self.hidden_size, device="cpu", dtype=torch.float32)
            w2 = torch.empty(self.hidden_size, self.ffn_size, device="cpu", dtype=torch.float32)
            self.w13[local].copy_(w13.normal_(0, std, generator=generator)[:, part])
            self.w2[local].copy_(w2.normal_(0, std, generator=generator)[:, part])

    def chosen_gemm(self) -> Literal["loop", "grouped"]:
        """What ``gemm`` comes to for the parameters as they are now.

        Raises:
            ValueError: if ``grouped`` was asked for and cannot run.
        """
        dtype = self.w13.dtype
        aligned = all(
            size * dtype.itemsize % GROUPED_ALIGNMENT_BYTES == 0
            for size in (self.hidden_size, self.ffn_local)
        )
        if self.gemm == "grouped" and (dtype == torch.float64 or not aligned):
            raise ValueError(
                f"gemm='grouped' needs a dtype other than float64 and rows of multiples of"
                f" {GROUPED_ALIGNMENT_BYTES} bytes, got {dtype} rows of {self.hidden_size} and"
                f" {self.ffn_local}: use gemm='loop'"
            )
        if self.gemm == "auto":
            fast = self.w13.is_cuda and dtype == torch.bfloat16 and aligned
            return "grouped" if fast else "loop"
        return self.gemm

    def forward(self, rows_AM: Tensor, counts: Sequence[int]) -> Tensor:
        """Apply each expert to its rows.

        Args:
            rows_AM: ``[A, hidden]``, rows of local expert 0 first, then 1, ...
            counts: rows of each local expert, on the host; zeros are fine, their sum is A.

        Returns:
            ``[A, hidden]``, in the same order.

        Gradients: to rows, ``w13`` and ``w2``; exact zeros for an expert without rows.

        The host does not wait for the device; ``grouped`` queues a copy of E_local x 4 bytes to it.
        """
        if self.chosen_gemm() == "grouped":
            return self._grouped(rows_AM, counts)
        outputs = []
        # unbind, not w[e]: the backward is then one stack, not a full-size zero tensor an expert.
        # An expert without rows is multiplied too, so that every rank builds the same graph.
        for x, w13, w2 in zip(rows_AM.split(list(counts)), self.w13.unbind(), self.w2.unbind()):
            gate, up = (x @ w13.flatten(0, 1).T).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ w2.T)
        return torch.cat(outputs)

    def _grouped(self, rows_AM: Tensor, counts: Sequence[int]) -> Tensor:
        # grouped_mm leaves rows beyond the last end uninitialised: A must be exactly the sum.
        # Pinned, so that the copy is queued behind the kernels before it: the host does not wait.
        ends = torch.tensor(
            list(accumulate(counts)), dtype=torch.int32, pin_memory=rows_AM.is_cuda
        ).to(rows_AM.device, non_blocking=True)
        grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm  # public from torch 2.10
        hidden = grouped_mm(rows_AM, self.w13.flatten(1, 2).transpose(1, 2), offs=ends)
        gate, up = hidden.chunk(2, dim=-1)
        output: Tensor = grouped_mm(F.silu(gate) * up, self.w2.transpose(1, 2), offs=ends)
        output = _ContiguousGrad.apply(output)  # type: ignore[no-untyped-call]
        return output


def generator_of(seed: int) -> torch.Generator:
    """A CPU generator at the start of a seed's sequence."""
    return torch.Generator("cpu").manual_seed(seed)


class _ContiguousGrad(torch.autograd.Function):
    """Identity whose gradient is contiguous: grouped_mm's backward rejects an expanded one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()
