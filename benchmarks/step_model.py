"""What does a step of training take on 2 to 1024 GPUs, part by part? A simulation from few numbers.

The model is that of ``benchmarks.hybrid_train``: seven lightning layers and a softmax layer, with
experts in each. One document is cut over ``cp`` ranks, experts over the GPUs of a host. Parts::

    products   weights and lightning layers: operations of a rank at the rate of products
    softmax    pairs of the busiest rank, by the layout planner, at the rate of softmax attention
    kv         keys and values of the neediest rank and their gradients, less what softmax hides
    experts    rows to the experts and back, forward and backward
    states     exchanges of the lightning layers, forward and backward, by their cost model
    gradients  of all that replicas share, summed over them in float32

Both rates are fitted to committed rows of one GPU; rows of two GPUs check the sum. Assumptions:

- All that moves has the links of ``lasp.state_exchange.cost``: NVLink up to 8 ranks, a network of
  50 GB/s a GPU above, whose bandwidth does not fall with the number of ranks.
- Keys and values are hidden as far as softmax attention lasts. Nothing else is hidden.
- Heads of lightning layers keep everything, and experts are chosen evenly.
- No rank is late, and neither the host nor the optimizer takes time.
- ``softmax_outputs`` computes all but the softmax layers' outputs a second time.

Run: python -m benchmarks.step_model --write docs/multi-node.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.harness import Row, markdown, read_rows
from benchmarks.lasp_model import one_document
from benchmarks.layer_group import layer_group
from benchmarks.marked import MarkedTables
from benchmarks.model_flops import step_flops
from lasp.hybrid import HybridConfig, HybridModel
from lasp.sequence.planner import CostModel, layout_costs
from lasp.state_exchange.choice import EXACT
from lasp.state_exchange.cost import StateSize, exchange_us, link_of, scan_blocks

FEWEST = 32768  # shorter batches wait for the host
HOST, RANKS = 8, (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# As many bytes as the keys and values of the forward: those again, and gradients in float32.
KV_BOTH = 3.5
PATTERNS = {"hybrid": "7:1", "softmax": "0:1"}


class Rates(NamedTuple):
    """Operations a millisecond of one GPU."""

    products: float
    softmax: float


class Job(NamedTuple):
    """What is trained: a document for each replica."""

    pattern: str
    tokens: int
    cp: int
    dp: int = 1
    recompute: bool = False

    @property
    def config(self) -> HybridConfig:
        """The layer group."""
        return layer_group(self.pattern)


class StepParts(NamedTuple):
    """Milliseconds of the slowest rank."""

    products: float
    softmax: float
    kv: float
    experts: float
    states: float
    gradients: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(self)


def fitted(rows: Sequence[Row]) -> Rates:
    """The rates of least squares of relative errors, over the rows of one GPU."""
    shares = []
    for row in rows:
        flops = step_flops(layer_group(PATTERNS[row["case"]["model"]]), (row["case"]["tokens"],))
        shares.append([(flops.weights + flops.lightning) / row["p50"], flops.softmax / row["p50"]])
    terms = torch.tensor(shares, dtype=torch.float64)
    times = torch.linalg.lstsq(terms, torch.ones(len(rows), 1, dtype=torch.float64)).solution
    products, softmax = (1 / times.flatten()).tolist()
    return Rates(products, softmax)


def simulated(job: Job, rates: Rates) -> StepParts:
    """A step by the model of the module."""
    config, ranks = job.config, job.cp * job.dp
    heads, moe = config.attention, config.moe
    assert moe is not None
    num_softmax = config.kinds.count("*")
    flops = step_flops(config, (job.tokens,))
    costs = CostModel(heads.num_heads, heads.num_kv_heads, heads.num_heads, heads.head_dim)
    layout = layout_costs((job.tokens,), job.cp, cost_model=costs)[0]
    per_ms = link_of(job.cp).gb_per_s * 1e6
    softmax = flops.softmax / job.cp * layout.balance / rates.softmax
    kv = num_softmax * KV_BOTH * layout.kv_bytes / per_ms
    ep = min(HOST, ranks)
    rows = job.tokens / job.cp * moe.top_k * (ep - 1) / ep
    experts = 4 * config.num_layers * rows * moe.hidden_size * 2 / (link_of(ep).gb_per_s * 1e6)
    again = 4 / 3 if job.recompute else 1
    return StepParts(
        (flops.weights + flops.lightning) / job.cp / rates.products * again,
        softmax,
        max(0.0, kv - softmax),
        experts * (1.5 if job.recompute else 1),
        2
        * (config.num_layers - num_softmax)
        * exchange_ms(job.cp, heads.num_heads, heads.head_dim),
        gradients_ms(config, ranks, ep),
    )


def exchange_ms(cp: int, heads: int, dim: int) -> float:
    """The time of sending the states of one layer in one direction; its heads keep everything."""
    if cp == 1:
        return 0.0
    traffic, size, link = one_document(cp), StateSize(heads, dim, dim), link_of(cp)
    blocks = scan_blocks(traffic, size, link)
    times = (exchange_us(n, traffic, size, link, blocks if n == "scan" else 1) for n in EXACT)
    return min(times) / 1e3


def gradients_ms(config: HybridConfig, ranks: int, ep: int) -> float:
    """All-reduces in float32: dense parameters over all ranks, experts over their replicas."""
    model = HybridModel(config, device="meta")
    dense = sum(parameter.numel() for _, parameter in model.dense_parameters())
    experts = sum(parameter.numel() for _, parameter in model.expert_parameters()) / ep
    replicas = ranks // ep
    elements = dense * (ranks - 1) / ranks + experts * (replicas - 1) / replicas
    return 2 * 4 * elements / (link_of(ranks).gb_per_s * 1e6)


def measured(folder: Path, num_devices: int) -> list[Row]:
    """Milliseconds of ``hybrid_train`` on so many GPUs, of one document, forward and backward.

    With even routers; on one GPU those that recompute nothing, from which the rates are fitted.
    """
    found = []
    for row in read_rows(folder):
        case = row["case"]
        if (row["benchmark"], row["metric"], row["impl"]) != ("hybrid_train", "ms", "lasp"):
            continue
        what = (case["documents"], case["part"], case["vocab_size"], case.get("routers"))
        if what != ("one", "forward_backward", 1024, "even") or case["tokens"] < FEWEST:
            continue
        if row["num_devices"] == num_devices and (num_devices > 1 or case["activations"] == "none"):
            found.append(row)
    return found


def tables(folder: Path) -> str:
    """The check on two GPUs, then steps of a million tokens."""
    rates = fitted(measured(folder, 1))
    head = [*StepParts._fields, "sum"]
    checks = []
    for row in measured(folder, 2):
        case = row["case"]
        again = case["activations"] == "softmax_outputs"
        parts = simulated(Job(PATTERNS[case["model"]], case["tokens"], 2, recompute=again), rates)
        # A rank sums no gradients in these rows.
        parts = parts._replace(gradients=0.0)
        cells = [case["model"], f"{case['tokens']:,}", case["activations"], f"{row['p50']:.0f}"]
        numbers = [f"{ms:.0f}" for ms in (*parts, parts.total)]
        checks.append([*cells, *numbers, f"{parts.total / row['p50']:.2f}"])
    lines = [
        f"Rates: products {rates.products / 1e9:.0f}, softmax {rates.softmax / 1e9:.0f} TFLOP/s."
    ]
    lines += ["", "Two GPUs, measured and simulated, ms:", ""]
    start = ["model", "tokens", "kept", "measured"]
    lines += markdown([*start, *head, "simulated / measured"], checks, [0, 2])
    million = 1 << 20
    for title, jobs in (
        ("One document of 1,048,576 tokens over all ranks, ms of a step:",
         [Job("7:1", million, cp) for cp in RANKS]),
        ("Replicas of 16 ranks, each with a document of 1,048,576 tokens, ms of a step:",
         [Job("7:1", million, 16, dp) for dp in (1, 2, 4, 8, 16, 32, 64)]),
    ):  # fmt: skip
        body = []
        for job in jobs:
            parts, ranks = simulated(job, rates), job.cp * job.dp
            tokens_per_s = 1e3 * job.tokens * job.dp / parts.total / ranks
            numbers = [f"{ms:.1f}" for ms in (*parts, parts.total)]
            body.append([str(ranks), str(job.cp), *numbers, f"{tokens_per_s:,.0f}"])
        lines += ["", title, "", *markdown(["GPUs", "cp", *head, "tokens/s a GPU"], body, [])]
    return "\n".join(lines)


TABLES = MarkedTables("simulated", tables)

if __name__ == "__main__":
    TABLES.answer(__doc__)
