"""A link is measured alike on every rank, and an exchange over it is chosen for it."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist

from lasp import SequenceLayout, lightning_attention
from lasp.sequence.state_flow import flow_of
from lasp.state_exchange import Link, exchange_over, link, measure_link, resolve_exchange
from lasp.state_exchange.choice import EXACT, NAMES, parse_exchange
from lasp.state_exchange.cost import NVLINK, StateSize, traffic_of
from tests.ranks import refusal, run_on_ranks
from tests.test_hybrid import config

SLOW = Link(latency_us=200, gb_per_s=0.0125, launch_us=100, rank_us=20)
GLOO = replace(SLOW, half_duplex=0.9)


def choice(exchange: str, num_ranks: int = 4) -> tuple[str, int]:
    layout = SequenceLayout((num_ranks,), num_ranks)
    (found,) = resolve_exchange(exchange, layout, (0.0,) * 8, 0.0, 64, 64)
    return found.strategy, found.num_blocks


def test_a_link_is_a_text_and_back() -> None:
    assert Link.parse(str(SLOW)) == SLOW
    text = "latency_us=5,gb_per_s=150,launch_us=17,rank_us=4"
    assert Link.parse(text) == NVLINK
    assert str(NVLINK) == f"{text},half_duplex=0"
    assert exchange_over(NVLINK) == f"auto over {NVLINK}"
    for name in NAMES:
        assert parse_exchange(exchange_over(SLOW, name)) == (name, SLOW)
        assert parse_exchange(name) == (name, None)


def test_auto_takes_what_costs_least_over_the_link() -> None:
    assert choice("auto") == ("all_gather", 1)
    assert choice(exchange_over(NVLINK)) == choice("auto")
    assert choice(exchange_over(SLOW)) == ("scan", 8)
    assert choice(exchange_over(GLOO)) == ("sliced", 1)
    assert choice("scan") == ("scan", 1)
    assert choice(exchange_over(SLOW, "scan")) == ("scan", 8)


@pytest.mark.parametrize(
    "exchange",
    ["fast", "fast over latency_us=1", "auto over", "auto over far", "auto over gb_per_s=1",
     "auto over latency_us=1,gb_per_s=0,launch_us=1,rank_us=1", 3, None],
)  # fmt: skip
def test_what_is_neither_a_name_nor_a_link_is_refused(exchange) -> None:
    x = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match=r"exchange must be one of|a link must"):
        lightning_attention(x, x, x, torch.zeros(1), exchange=exchange)


def test_the_fit_finds_the_link_behind_the_times() -> None:
    timed = []
    for ranks in (2, 4):
        flow = flow_of(SequenceLayout((ranks,), ranks), 0)
        traffic = traffic_of(flow.steps, ranks, lambda length: True)
        for heads in (1, 8, 64):
            for name in EXACT:
                one = link.TimedExchange(name, traffic, StateSize(heads, 64, 64), 2, 0.0)
                timed.append(one._replace(us=one.model_us(GLOO)))
    assert asdict(link.fit_link(timed)) == pytest.approx(asdict(GLOO), rel=1e-6)
    # Two ranks do not tell launch, latency and rank apart: the sums are the same.
    found = link.fit_link(timed[:9])
    for one in timed[:9]:
        assert one.model_us(found) == pytest.approx(one.us, rel=1e-3)


def measured_on_rank() -> tuple[Link, str, torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD
    found = measure_link(group, samples=3)
    message = refusal(measure_link, group, samples=0)
    layout = SequenceLayout((40, 8), group.size())
    torch.manual_seed(0)
    pack = torch.randn(3, 48, 2, 4, dtype=torch.float64)
    q, k, v = (layout.shard(x, group.rank()) for x in pack)
    outputs = [
        lightning_attention(
            q, k, v, torch.tensor([0.0, 0.1]), layout=layout, cp_group=group, exchange=exchange
        ).output
        for exchange in ("auto", exchange_over(found))
    ]
    return found, message, *outputs


def test_every_rank_has_the_same_link_and_results_do_not_depend_on_it() -> None:
    results = run_on_ranks(measured_on_rank, 2)
    (found, message, *_), (other, *_) = results
    assert found == other
    assert found.gb_per_s > 0
    assert "samples must be an integer >= 1, got 0" in message
    for _, _, plain, over in results:
        assert torch.equal(plain, over)


def test_a_config_takes_an_exchange_over_a_link() -> None:
    assert replace(config(), exchange=exchange_over(SLOW)).exchange == f"auto over {SLOW}"
    with pytest.raises(ValueError, match="a link must be a text like"):
        replace(config(), exchange="auto over ")
    with pytest.raises(ValueError, match="a link must be a text like"):
        replace(config(), exchange="auto over far")
