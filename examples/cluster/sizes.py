"""Parallel sizes for one long context over many nodes: which ranks share a pack, and which experts.

    python examples/cluster/sizes.py --nodes 16

A rank gets as many tokens as fit: ``cp`` is the context by that, the rest of the ranks are
replicas (``dp``) with packs of their own. Experts stay on a node, where links are fastest: ``ep``
is its GPUs, or the experts if they are fewer. The layout planner names the order of the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import tyro

from lasp.sequence import plan_layout
from lasp.sequence.planner import layout_costs
from moe_parallel import ExpertTopology


@dataclass(frozen=True)
class Options:
    """What is there, and what is to be trained.

    Attributes:
        nodes: hosts.
        gpus: of a node; a rank each.
        context: tokens of a pack.
        rank_tokens: most tokens of a rank that fit into its GPU: 65,536 take 62 GB in eight layers
            of width 2048.
        experts: of a layer.
    """

    nodes: int = 2
    gpus: int = 8
    context: int = 1048576
    rank_tokens: int = 65536
    experts: int = 8


class Sizes(NamedTuple):
    """Parallel sizes of a job."""

    cp: int
    dp: int
    ep: int
    etp: int
    order: str
    context: int

    @property
    def flags(self) -> str:
        """Flags of ``examples/05_train_hybrid.py``; a step has one pack for each replica."""
        return (
            f"--cp {self.cp} --ep {self.ep} --etp {self.etp} --order {self.order}"
            f" --packs {self.dp} --pack-tokens {self.context}"
        )


def sizes_of(options: Options) -> Sizes:
    """The sizes; ValueError says what does not go together."""
    ranks = options.nodes * options.gpus
    needed = math.ceil(options.context / options.rank_tokens)
    cp = next((n for n in range(needed, ranks + 1) if ranks % n == 0), None)
    if cp is None:
        raise ValueError(
            f"nodes must hold {options.context} tokens, {options.rank_tokens} on each of"
            f" {needed} ranks, got {ranks} ranks: take more nodes or a shorter context"
        )
    ep = math.gcd(options.gpus, options.experts)
    ExpertTopology(ranks, cp=cp, ep=ep, etp=1)  # raises where they do not fit
    order = plan_layout((options.context,), cp).order
    return Sizes(cp, ranks // cp, ep, 1, order, options.context)


def report(options: Options, sizes: Sizes) -> str:
    """The sizes in words, what crosses ranks in layers of MiniMax-Text-01, and the flags."""
    cost = layout_costs((options.context,), sizes.cp)[0]
    tokens = options.context // sizes.cp
    return "\n".join(
        [
            f"{options.nodes} nodes of {options.gpus} GPUs, {options.context} tokens a pack",
            f"cp {sizes.cp}: {tokens} tokens a rank, order {sizes.order};"
            f" dp {sizes.dp}: {sizes.dp} packs a step",
            f"ep {sizes.ep}, etp {sizes.etp}: an expert's tokens stay on its node;"
            f" {sizes.dp * sizes.cp // (sizes.ep * sizes.etp)} replicas of each expert",
            f"a rank receives {cost.kv_bytes / 1e6:.0f} MB of keys and values in a softmax layer,"
            f" {cost.state_bytes / 1e6:.1f} MB of states in a lightning layer",
            sizes.flags,
        ]
    )


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    print(report(options, sizes_of(options)))
