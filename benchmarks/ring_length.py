"""What does ring attention cost on one document, against one GPU and against peers?

Every rank holds the same number of tokens. Under a causal mask or without one, P ranks with T
tokens each have P times the work, each, of one rank that attends to its T tokens alone. So the
bound is P times the time of that on one GPU, by the fastest dense kernel that is installed, FA4 or
cuDNN's, in the same run (on CPUs PyTorch's flash attention). The ring is measured in the order that
balances, zigzag; the peers of ``benchmarks.ring_peers`` in the order that each needs.

Calls take turns; samples are those of ``benchmarks.timing``: the slowest rank counts. Bytes are
counted at the collectives. ``both_ms`` is forward and backward; ``extra_bytes`` the peak memory of
both besides arguments and results.

Run: torchrun --nproc-per-node 4 -m benchmarks.ring_length --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import ring_cases
from benchmarks.harness import Forward, Machine, Row, answer
from benchmarks.ring_cases import Case, compare, peers, question
from ring.blocks.interface import Operands
from ring.blocks.registry import BLOCKS

aten = torch.ops.aten
NAME, ALONE = "ring_length", "one rank's tokens alone"


@dataclass(kw_only=True)
class Options(ring_cases.Options):
    """Options: tokens of a rank; two lengths take about five minutes on 4 GPUs."""

    tokens: tuple[int, ...] = (8192, 32768)


def alone(case: Case) -> Forward:
    """The tokens of one rank as a document of their own, by the fastest dense kernel."""

    def by_fa4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from flash_attn.cute import flash_attn_func

        output, *_ = flash_attn_func(q[None], k[None], v[None], causal=case.causal)
        return output[0]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        operands = Operands(q.device, q.dtype, case.head_dim, case.head_dim)
        if BLOCKS["fa4"].obstacle(operands) is None:
            return by_fa4(q, k, v)
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        if q.is_cuda:
            output, *_ = aten._scaled_dot_product_cudnn_attention(
                *heads_first, None, True, 0.0, case.causal
            )
        else:
            output, _ = aten._scaled_dot_product_flash_attention_for_cpu(
                *heads_first, 0.0, case.causal
            )
        return output[0].transpose(0, 1)

    return forward


def measure(case: Case, machine: Machine) -> Iterator[Row]:
    """Rows of one case: ours in its order, peers in theirs."""
    others: dict[str, Forward] = {}
    for order in ("zigzag", "contiguous"):
        others |= peers(case._replace(order=order), machine.device)
    ranks, reference = dist.get_world_size(), (ALONE, alone(case), case.tokens)
    yield from compare(NAME, case, machine, others, reference, (ranks, f"{ranks} x {ALONE}"))


def cases(options: Options) -> list[Case]:
    """Causal at every length, and without a mask at the last."""
    masks = [(tokens, True) for tokens in options.tokens] + [(options.tokens[-1], False)]
    return [Case(tokens, *options.shape, causal, "one", "zigzag") for tokens, causal in masks]


QUESTION = question(NAME, Options, cases, measure)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
