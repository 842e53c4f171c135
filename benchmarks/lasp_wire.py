"""How long does an exchange take over a slow network, and does the cost model say so?

The link is measured first (:func:`lasp.state_exchange.measure_link`), on states of other sizes.
Every exchange is then chosen, or cut into blocks, for that link; its bound is the model over it.
``head parallel`` moves tokens instead of states: q, k and v to the ranks of their heads and the
output back. Its bound is the bytes it receives at the bandwidth of the link. ``gbit_per_s`` and
``latency_ms`` only say in the rows which wire the ranks have: ``benchmarks.hosts`` makes it.

Run: python -m benchmarks.hosts --hosts 2 --gbit-per-s 0.1 --program -m benchmarks.lasp_wire
--gbit-per-s 0.1 --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks import harness, lasp_peers
from benchmarks.harness import Machine, RankOptions, Row
from benchmarks.timing import Timed, samples_ms
from lasp import SequenceLayout
from lasp.lightning.op_context import OpContext, start
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange import ExchangeChoice, Link, exchange_over, measure_link, resolve_exchange
from lasp.state_exchange.choice import EXACT
from lasp.state_exchange.cost import StateSize, exchange_us, traffic_of

TOKENS = "head parallel"
LONGEST_MS = 5000


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options: heads that keep everything, of one document over contiguous ranks."""

    device: Literal["cuda", "cpu"] = "cpu"
    heads: tuple[int, ...] = (8, 64)
    head_dims: tuple[int, ...] = (64,)
    tokens: int = 4096
    gbit_per_s: float = 0.0
    latency_ms: float = 0.0


def exchanges(heads: int, dim: int, link: Link) -> dict[str, tuple[ExchangeChoice, ...]]:
    """What each strategy, and ``auto``, comes to over a link."""
    ranks = dist.get_world_size()
    layout = SequenceLayout((ranks,), ranks)
    resolve = partial(
        resolve_exchange, layout=layout, rates=(0.0,) * heads, eps=0.0, key_dim=dim, value_dim=dim
    )
    return {name: resolve(exchange_over(link, name)) for name in (*EXACT, "auto")}


def model_ms(choices: tuple[ExchangeChoice, ...], dim: int, link: Link) -> float:
    """By the cost model."""
    ranks = dist.get_world_size()
    traffic = traffic_of(flow_of(SequenceLayout((ranks,), ranks), 0).steps, ranks, lambda n: True)
    return (
        sum(
            exchange_us(c.strategy, traffic, StateSize(len(c.heads), dim, dim), link, c.num_blocks)
            for c in choices
        )
        / 1e3
    )


def measure(case: dict[str, Any], link: Link, machine: Machine) -> Iterator[Row]:
    """Rows of every strategy, of ``auto`` and of tokens that move, in turns."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    heads, dim, tokens = case["heads"], case["head_dim"], case["tokens"]
    layout = SequenceLayout((ranks,), ranks)
    flow, rates = flow_of(layout, rank), torch.zeros(heads, device=machine.device)
    states = torch.randn(flow.num_slots, heads, dim, dim, device=machine.device)
    timed, choices = {}, exchanges(heads, dim, link)
    for name, some in choices.items():
        op = OpContext(layout, rank, dist.group.WORLD, 1.0, some, False, 0.0, (0.0,) * heads)
        timed[name] = Timed(lambda op=op: start(states, rates, flow, op)())
    for name, times in samples_ms(timed, machine).items():
        facts = case | {"strategy": [[c.strategy, c.num_blocks] for c in choices[name]]}
        model = {"bound": model_ms(choices[name], dim, link), "bound_name": "model, over the link"}
        yield harness.row("lasp_wire", facts, name, "exchange_ms", times, "ms", **model)
    qkv, output = harness.draw(machine, (tokens, heads, 3 * dim), (tokens, heads, dim))
    sent = (qkv.nbytes + output.nbytes) * (ranks - 1) / ranks
    least: dict[str, Any] = {
        "bound": sent / link.gb_per_s / 1e6,
        "bound_name": "bytes at the link's bandwidth",
    }
    if least["bound"] > LONGEST_MS:
        harness.say(f"left out: {TOKENS}, which would take {least['bound'] / 1e3:.0f} s or more")
        return
    moved = {TOKENS: Timed(lambda: lasp_peers.move_tokens(qkv, output))}
    times = samples_ms(moved, machine._replace(samples=3))[TOKENS]
    yield harness.row("lasp_wire", case, TOKENS, "exchange_ms", times, "ms", **least)


def check(link: Link, machine: Machine) -> None:
    """What each rank receives by every strategy, against the sums of the ranks before it."""
    heads, dim, ranks, rank = 4, 8, dist.get_world_size(), dist.get_rank()
    layout = SequenceLayout((ranks,), ranks)
    flow, rates = flow_of(layout, rank), torch.zeros(heads, device=machine.device)
    states = torch.full((flow.num_slots, heads, dim, dim), 1.0 + rank, device=machine.device)
    before = torch.full((heads, dim, dim), rank * (rank + 1) / 2, device=machine.device)
    for name, some in exchanges(heads, dim, link).items():
        op = OpContext(layout, rank, dist.group.WORLD, 1.0, some, False, 0.0, (0.0,) * heads)
        harness.check(name, [1 + start(states, rates, flow, op)()[0]], [1 + before])


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Measure the link, check, then every size of state."""
    link = measure_link(dist.group.WORLD)
    harness.say(f"link: {link}")
    check(link, machine)
    wire = {"ranks": dist.get_world_size(), "gbit_per_s": options.gbit_per_s}
    wire |= {"latency_ms": options.latency_ms, "tokens": options.tokens, "link": str(link)}
    for heads, dim in product(options.heads, options.head_dims):
        yield from measure({**wire, "heads": heads, "head_dim": dim}, link, machine)


QUESTION = harness.Question("lasp_wire", Options, rows)

if __name__ == "__main__":
    harness.answer(QUESTION, __doc__)
