"""What do windows, latents and packs cost beside the bare kernel, and over ranks?

Each case is one pack, whose tokens are those of all ranks. In one run there are

- ``ring``: the operator over the ranks, in the order of the case;
- ``ring, deterministic``: the same under ``torch.use_deterministic_algorithms``, both directions;
- ``whole pack on one GPU``: the operator on one rank; over P it is the bound of ``ring``;
- ``bare FA4``: one call of flash-attn-4 for all documents, where it is installed; the bound of the
  whole pack on one GPU. Latents have none: there the operator makes keys and values too.

On one rank ``ring`` and the whole pack are the same: the question is what the operator adds to the
kernel. ``one`` is one document, ``window`` too, of which a row sees 4096 keys; ``latent`` has
DeepSeek-V3's head dims; ``pareto``, ``equal`` and ``short`` are packs of long and short documents.

Run: torchrun --nproc-per-node 2 -m benchmarks.ring_kinds --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Forward, Machine, Question, RankOptions, Row, answer
from benchmarks.ring_cases import timed
from benchmarks.timing import bounded, most
from benchmarks.wire import measured_bytes
from lasp import SequenceLayout
from lasp.sequence.planner import plan_layout
from ring import ring_attention, ring_latent_attention
from ring.blocks.interface import Operands
from ring.blocks.registry import BLOCKS

NAME, OURS, WHOLE, BARE = "ring_kinds", "ring", "whole pack on one GPU", "bare FA4"
REPEATABLE = "ring, deterministic"
KINDS = ("one", "pareto", "equal", "short", "window", "latent")


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options: tokens of a rank, heads, and which kinds of attention."""

    tokens: int = 32768
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    latent: tuple[int, int] = (512, 64)
    window: int = 4096
    kinds: tuple[str, ...] = KINDS
    samples: int = 10


class Case(NamedTuple):
    """What is measured; ``latent`` is the elements that heads are made of, and those they share."""

    kind: str
    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    latent: tuple[int, int]
    window: int

    def lengths(self) -> tuple[int, ...]:
        """The document lengths of the whole pack."""
        total = self.tokens * dist.get_world_size()
        generator = torch.Generator().manual_seed(0)
        if self.kind == "pareto":
            drawn = torch.rand(max(8, total // 1280), generator=generator).pow(-1 / 0.8)
            return _scaled(drawn, total)
        if self.kind == "equal":
            return (max(1, total // 64),) * min(64, total)
        if self.kind == "short":
            return _scaled(torch.rand(max(1, total // 208), generator=generator) + 0.1, total)
        return (total,)

    def layout(self) -> SequenceLayout:
        """Who holds which tokens; windows need the least of others where runs are long."""
        ranks = dist.get_world_size()
        if self.kind == "window":
            return SequenceLayout(self.lengths(), ranks)
        return plan_layout(self.lengths(), ranks)

    def inputs(self, machine: Machine, tokens: int) -> tuple[list[Tensor], Tensor]:
        """Tensors that want gradients, and the gradient of the output."""
        heads, dim, (rank, shared) = self.heads, self.head_dim, self.latent
        if self.kind == "latent":
            shapes = [
                (tokens, heads, dim + shared),
                (tokens, rank + shared),
                (heads, 2 * dim, rank),
            ]
        else:
            kv = (tokens, self.kv_heads, dim)
            shapes = [(tokens, heads, dim), kv, kv]
        *leaves, do = harness.draw(machine, *shapes, (tokens, heads, dim))
        if self.kind == "latent":
            leaves[2] /= rank**0.5
        return [x.requires_grad_() for x in leaves], do

    def forward(self, layout: SequenceLayout, group: Any = None) -> Forward:
        """The operator."""
        how: dict[str, Any] = {"layout": layout, "cp_group": group}
        if self.kind == "window":
            how["window"] = (self.window, 0)
        operator = ring_latent_attention if self.kind == "latent" else ring_attention
        return lambda *tensors: operator(*tensors, **how).output

    def bare(self, machine: Machine) -> Forward | None:
        """One call of the kernel for the whole pack; None where there is none."""
        operands = Operands(torch.device(machine.device), machine.dtype, *[self.head_dim] * 2)
        if self.kind == "latent" or BLOCKS["fa4"].obstacle(operands) is not None:
            return None
        from flash_attn.cute import flash_attn_varlen_func

        lengths = self.lengths()
        borders = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=machine.device)
        left = self.window if self.kind == "window" else None
        kernel = partial(
            flash_attn_varlen_func, cu_seqlens_q=borders, cu_seqlens_k=borders,
            max_seqlen_q=max(lengths), max_seqlen_k=max(lengths), causal=True,
            window_size=(left, 0 if left else None),
        )  # fmt: skip
        return lambda q, k, v: kernel(q, k, v)[0]

    def row(
        self, impl: str, metric: str, values: float | list[float], unit: str, **more: Any
    ) -> Row:
        """A row of this case."""
        facts = self._asdict() | {"ranks": dist.get_world_size(), "order": self.layout().order}
        return harness.row(NAME, facts, impl, metric, values, unit, **more)


class Deterministic:
    """In its block every backward gives the same bits again; no memory is filled for that."""

    def __enter__(self) -> None:
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def _scaled(weights: Tensor, total: int) -> tuple[int, ...]:
    """Lengths in these proportions, none 0, that sum to ``total``."""
    cuts = (weights.double().cumsum(0) / weights.sum() * total).long().tolist()
    lengths = [b - a for a, b in zip((0, *cuts), cuts)]
    lengths[-1] += total - sum(lengths)
    return tuple(n for n in lengths if n)


def check(case: Case, machine: Machine) -> None:
    """The ring against the whole pack on one rank, and that against the bare kernel."""
    layout, rank = case.layout(), dist.get_rank()
    leaves, do = case.inputs(machine, sum(case.lengths()))
    if dist.get_world_size() > 1:
        for x in (*leaves, do):
            dist.broadcast(x.data, 0)
    whole = case.forward(SequenceLayout(case.lengths(), 1))(*leaves).detach()
    rows = 3 if case.kind != "latent" else 2  # the weight is whole on every rank
    mine = [layout.shard(x, rank) if i < rows else x for i, x in enumerate(leaves)]
    part = case.forward(layout, dist.group.WORLD)(*mine).detach()
    expected = layout.shard(whole, rank)
    real = torch.cat([torch.arange(*run) for run in layout.runs(rank)]) < layout.num_real_tokens
    real = real.to(machine.device)
    harness.check(f"{OURS} {case.kind}", [part[real]], [expected[real]], 3e-2)
    if (bare := case.bare(machine)) is not None:
        harness.check(f"{BARE} {case.kind}", [bare(*leaves).detach()], [whole], 3e-2)


def measure(case: Case, machine: Machine) -> Iterator[Row]:
    """Rows of bytes, and of times in turns."""
    layout, ranks = case.layout(), dist.get_world_size()
    own = case.inputs(machine, layout.num_local_tokens)
    ours = case.forward(layout, dist.group.WORLD)
    for metric, count in measured_bytes(ours, *own).items():
        yield case.row(OURS, metric, most(count, machine), "bytes")
    whole = case.inputs(machine, sum(case.lengths()))
    calls = {
        OURS: timed(ours, *own),
        WHOLE: timed(case.forward(SequenceLayout(case.lengths(), 1)), *whole),
    }
    if (bare := case.bare(machine)) is not None:
        calls[BARE] = timed(bare, *whole)
    for metric in ("forward_ms", "both_ms"):
        chosen = {impl: call[metric] for impl, call in calls.items()}
        # Products of latents would need a setting of cuBLAS.
        if metric == "both_ms" and case.kind != "latent":
            chosen[REPEATABLE] = chosen[OURS]._replace(in_force=Deterministic())
        of_whole = (WHOLE, 1 / ranks, f"{WHOLE} / P")
        found = list(bounded(case.row, metric, chosen, machine, of_whole, without=(BARE,)))
        kernel = next((row["p50"] for row in found if row["impl"] == BARE), None)
        for row in found:
            if row["impl"] == WHOLE and kernel is not None:
                row |= {"bound": kernel, "bound_name": BARE}
            yield row


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """All kinds, checked before they are measured."""
    sizes = (options.heads, options.kv_heads, options.head_dim, options.latent, options.window)
    cases = [Case(kind, options.tokens, *sizes) for kind in options.kinds]
    for case in cases:
        small = case._replace(tokens=min(case.tokens, 2048), window=min(case.window, 700))
        check(small, machine)
    for case in cases:
        yield from measure(case, machine)


QUESTION = Question(NAME, Options, rows, cpu_dtype=torch.float32, high_priority=True)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
