"""What does ring attention cost on packs, by distribution of document lengths and by layout?

The distributions are A, B and C of ``tests.lasp.distributions``. Each is laid out as
``plan_layout`` picks, contiguous, and zigzag; and there is a pack of equal documents, one a rank,
that no rank border cuts. The bound is the time of the whole pack on one GPU, by the same kernels in
the same run, over the number of ranks. The peer is ring_flash_attn's llama3; its zigzag needs every
document to divide by 2 P.

Besides times and counted bytes there are rows of the plan: ``balance``, work of the busiest rank
over the mean; ``needed_bytes``, keys and values that the neediest rank must receive forward, to be
compared with ``forward_bytes``; ``tile_fill``, the share of 128 x 128 tiles of scores that is used.

Run: torchrun --nproc-per-node 4 -m benchmarks.ring_packed --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist

from benchmarks import ring_cases
from benchmarks.harness import Forward, Machine, Row, answer
from benchmarks.ring_cases import OURS, Case, compare, peers, question
from lasp import SequenceLayout
from lasp.sequence.planner import plan_layout
from ring import ring_attention
from ring.planner.schedule import plan_ring

NAME, WHOLE, TILE = "ring_packed", "whole pack on one GPU", 128


@dataclass(kw_only=True)
class Options(ring_cases.Options):
    """Options: tokens of a rank, distributions, and orders, of which ``planned`` names the best."""

    tokens: int = 32768
    documents: tuple[str, ...] = ("A", "B", "C", "equal")
    orders: tuple[str, ...] = ("planned", "contiguous", "zigzag")


def whole_pack(case: Case) -> Forward:
    """All tokens of all ranks, on each rank."""
    layout = SequenceLayout(case.lengths(), 1)
    return lambda q, k, v: ring_attention(q, k, v, layout=layout, causal=case.causal).output


def planned(case: Case, item_bytes: int) -> Iterator[Row]:
    """Rows of what the plan says, for all ranks."""
    layout = case.layout()
    ranks = range(layout.num_ranks)
    work = [layout.work(rank) for rank in ranks]
    schedules = [plan_ring(layout, rank, case.causal) for rank in ranks]
    needed = max(schedule.received_tokens for schedule in schedules)
    token_bytes = 2 * case.kv_heads * case.head_dim * item_bytes
    filled = [tile_fill(layout, rank, case.causal) for rank in ranks]
    for metric, value, unit in (
        ("balance", max(work) * len(work) / sum(work), "ratio"),
        ("needed_bytes", float(needed * token_bytes), "bytes"),
        ("tile_fill", sum(used for used, _ in filled) / sum(of for _, of in filled), "share"),
    ):
        yield case.row(NAME, OURS, metric, value, unit)


def tile_fill(layout: SequenceLayout, rank: int, causal: bool) -> tuple[int, int]:
    """Scores of a rank that are used, and scores of the tiles that hold them."""
    schedule = plan_ring(layout, rank, causal)
    used = held = 0
    for fragment in layout.fragments(rank):
        length = fragment.stop - fragment.start
        side = -(-length // TILE)
        used += length * (length + 1) // 2 if causal else length**2
        held += TILE**2 * (side * (side + 1) // 2 if causal else side**2)
    for tile in (*schedule.own_tiles, *(t for stage in schedule.stages for t in stage.tiles)):
        rows, keys = schedule.rows[tile.rectangle].length, tile.num_keys
        used += rows * keys
        held += TILE**2 * -(-rows // TILE) * -(-keys // TILE)
    return used, held


def measure(case: Case, machine: Machine) -> Iterator[Row]:
    """Rows of one pack under one layout, and whether that is the planned one."""
    lengths, ranks = case.lengths(), dist.get_world_size()
    reference = (WHOLE, whole_pack(case), sum(lengths))
    others, bound = peers(case, machine.device), (1 / ranks, f"{WHOLE} / P")
    best = plan_layout(lengths, ranks).order
    for made in (
        planned(case, machine.dtype.itemsize),
        compare(NAME, case, machine, others, reference, bound),
    ):
        for row in made:
            row["case"]["planned"] = case.order == best
            yield row


def cases(options: Options) -> list[Case]:
    """Each distribution under each order once."""
    found = []
    for documents in options.documents:
        case = Case(options.tokens, *options.shape, True, documents, "contiguous")
        best = plan_layout(case.lengths(), dist.get_world_size()).order
        orders = dict.fromkeys(best if order == "planned" else order for order in options.orders)
        found += [case._replace(order=order) for order in orders]
    return found


QUESTION = question(NAME, Options, cases, measure)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
