"""What does ring attention cost on one document, against one GPU and against peers?

Every rank holds the same number of tokens. Under a causal mask or without one, P ranks with T
tokens each have P times the work, each, of one rank that attends to its T tokens alone. So the
bound is P times the time of that on one GPU, by cuDNN's dense kernel, in the same run (on CPUs
PyTorch's flash attention). The ring is measured in the order that balances, zigzag; the peers of
``benchmarks.ring_peers`` in the order that each needs.

Calls take turns; samples are those of ``benchmarks.lasp_ranks``: the slowest rank counts. Bytes are
counted at the collectives. ``both_ms`` is forward and backward; ``extra_bytes`` the peak memory of
both besides arguments and results.

Run: torchrun --nproc-per-node 4 -m benchmarks.ring_length --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.ring_cases import (
    OURS,
    Case,
    Machine,
    arguments,
    compare,
    inputs,
    measured_bytes,
    ours,
    peers,
    run,
    timed,
)
from benchmarks.ring_peers import Forward

aten = torch.ops.aten
NAME, ALONE = "ring_length", "one rank's tokens alone"


def alone(case: Case) -> Forward:
    """The tokens of one rank as a document of their own, by PyTorch's fastest dense kernel."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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


def measure(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows of one case: ours in its order, peers in theirs."""
    leaves, do = inputs(case, machine, case.tokens)
    yield from measured_bytes(NAME, case, machine, ours(case), leaves, do)
    forwards = {ALONE: alone(case), OURS: ours(case)}
    for order in ("zigzag", "contiguous"):
        forwards |= peers(case._replace(order=order), machine.device)
    calls = {name: timed(forward, leaves, do) for name, forward in forwards.items()}
    ranks = dist.get_world_size()
    yield from compare(NAME, case, calls, machine, (ALONE, ranks, f"{ranks} x {ALONE}"))


def cases(options: argparse.Namespace) -> list[Case]:
    """Causal at every length, and without a mask at the last."""
    shape = (options.heads, options.kv_heads, options.head_dim)
    masks = [(tokens, True) for tokens in options.tokens] + [(options.tokens[-1], False)]
    return [Case(tokens, *shape, causal, "one", "zigzag") for tokens, causal in masks]


def main() -> None:
    """Two lengths, about five minutes on 4 GPUs."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    options = parser.parse_args()
    run(options, lambda: cases(options), measure)


if __name__ == "__main__":
    main()
