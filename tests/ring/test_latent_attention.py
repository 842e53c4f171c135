"""Multi-head latent attention: exact over ranks, packs and orders, and only latents move."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lasp.sequence.layout import SequenceLayout
from ring import ring_attention, ring_latent_attention
from ring.planner.schedule import plan_ring
from ring.planner.stages import StageRule
from ring.reference import dense_attention
from tests.closeness import assert_equal_to_rounding, assert_within_budget
from tests.ranks import run_on_ranks
from tests.ring.blocks.test_blocks import skip_unless_it_serves
from tests.ring.cases import NOTHING_HIDES, ORDERS, RULES, planned_by, rank_device

PACKS = ((16,), (5, 1, 10), (0, 4, 0, 7, 1), (37, 1, 2))
# Heads, own and shared dims of a key, dims of a value, dims of a latent that heads are made of.
SHAPES = ((3, 4, 2, 3, 5), (2, 3, 0, 5, 4), (1, 2, 4, 1, 3))
NAMES = ("output", "lse", "dq", "dlatent", "dweight", "dsinks")


def random_latents(tokens: int, shape: tuple[int, ...], dtype=torch.float64) -> list[Tensor]:
    """q, latent, gradient of the output, and then, for all tokens, weight and sinks."""
    heads, own, shared, value_dim, rank = shape
    sizes = (
        (tokens, heads, own + shared),
        (tokens, rank + shared),
        (tokens, heads, value_dim),
        (heads, own + value_dim, rank),
        (heads,),
    )
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def expanded(latent: Tensor, weight: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of all heads, written out."""
    rank = weight.shape[2]
    both = torch.einsum("tr,hwr->thw", latent[:, :rank], weight)
    own = head_dim - latent.shape[1] + rank
    shared = latent[:, None, rank:].expand(-1, len(weight), -1)
    return torch.cat((both[..., :own], shared), -1), both[..., own:]


def oracle(tensors, layout: SequenceLayout, causal: bool, window=(-1, -1)) -> list[Tensor]:
    q, latent, doutput, weight, sinks = (x.double() for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, latent, weight, sinks)]
    head_dim = q.shape[-1]
    output, lse = dense_attention(
        leaves[0],
        *expanded(*leaves[1:3], head_dim),
        cu_seqlens=list(accumulate(layout.document_lengths, initial=0)),
        causal=causal,
        scale=head_dim**-0.5,
        window=window,
        sinks=leaves[3],
    )
    gradients = torch.autograd.grad(output, leaves, doutput)
    return [x.detach() for x in (output, lse, *gradients)]


def results(tensors, layout, *, rank=0, device="cpu", **kwargs) -> list[Tensor]:
    """Results and gradients of this rank's tokens; ``tensors`` are the whole pack's."""
    *rows, weight, sinks = tensors
    q, latent, doutput = (layout.shard(x, rank).to(device) for x in rows)
    leaves = [x.detach().to(device).requires_grad_() for x in (q, latent, weight, sinks)]
    output, lse = ring_latent_attention(*leaves[:3], sinks=leaves[3], layout=layout, **kwargs)
    output.backward(doutput)
    return [x.detach().cpu() for x in (output, lse, *(x.grad for x in leaves))]


def on_world(cases) -> list[list[Tensor]]:
    where: dict[str, Any] = {"cp_group": dist.group.WORLD, "device": rank_device()}
    found = []
    for tensors, layout, rule, kwargs in cases:
        with planned_by(rule):
            found.append(results(tensors, layout, rank=dist.get_rank(), **where, **kwargs))
    return found


def whole(layout: SequenceLayout, parts) -> list[Tensor]:
    """Rows put together; gradients of the weight and of the sinks summed."""
    by_name = list(zip(*parts))
    return [*(layout.unshard(x) for x in by_name[:4]), *(sum(x) for x in by_name[4:])]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_in_float64_over_ranks(num_ranks: int, causal: bool) -> None:
    cases = []
    for index, lengths in enumerate(PACKS):
        for number, order in enumerate((*ORDERS, "document_zigzag")):
            layout = SequenceLayout(lengths, num_ranks, order)
            tensors = random_latents(sum(lengths), SHAPES[(index + number) % 3])
            options: dict[str, Any] = {"causal": causal}
            options |= {"window": (6, 0)} if number == 1 else {}
            cases.append((tensors, layout, RULES[(index + 3 * number) % len(RULES)], options))
    for (tensors, layout, _, options), *parts in zip(
        cases, *run_on_ranks(on_world, num_ranks, cases)
    ):
        expected = oracle(tensors, layout, **options)
        for name, a, b in zip(NAMES, whole(layout, parts), expected, strict=True):
            assert_equal_to_rounding(a, b, what=name)


def logged_on_world(tensors, layout: SequenceLayout, rule: StageRule) -> list[tuple]:
    """Elements received in each exchange, and their dtype."""
    calls, original = [], dist.all_to_all_single

    def logged(received, sent, *args, **kwargs):
        calls.append((received.numel(), received.dtype))
        return original(received, sent, *args, **kwargs)

    with patch.object(dist, "all_to_all_single", logged):
        on_world([(tensors, layout, rule, {})])
    return calls


@pytest.mark.parametrize("chain_gain", [0.0, math.inf])
def test_bytes_are_those_of_the_latents(chain_gain: float) -> None:
    rule = StageRule(2, 1, NOTHING_HIDES, chain_gain=chain_gain)
    layout, width = SequenceLayout((7, 2, 20, 1), 3, "zigzag"), 5 + 2
    logs = run_on_ranks(
        logged_on_world, 3, random_latents(30, SHAPES[0], torch.bfloat16), layout, rule
    )
    for rank, calls in enumerate(logs):
        schedule = plan_ring(layout, rank, True, rule)
        back = sum(sum(s.grad_exchange.receive_tokens) for s in schedule.stages)
        moved = {
            dtype: sum(n for n, found in calls if found == dtype)
            for dtype in (torch.bfloat16, torch.float32)
        }
        assert moved[torch.bfloat16] == 2 * width * schedule.received_tokens  # and in the backward
        assert moved[torch.float32] == width * back
        assert len(calls) == 3 * len(schedule.stages)


def check_budget(block: str, device: str, shape: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layout, dtype = SequenceLayout(lengths, 1), torch.bfloat16
    tensors = random_latents(sum(lengths), shape, dtype)
    tensors[3] /= shape[4] ** 0.5
    expected = oracle(tensors, layout, True)
    honest, actual = (
        results(tensors, layout, block=name, device=device) for name in ("eager", block)
    )
    for name, a, b, c in zip(NAMES, actual, expected, honest, strict=True):
        assert_within_budget(a, b, c.to(dtype), what=name)


def check_within_budget(lengths, layout, sizes, shrunk: int, backend: str = "gloo") -> None:
    """Twice the error of one rank in plain torch, which rounds keys and values once."""
    torch.manual_seed(0)
    tensors = random_latents(sum(lengths), sizes, torch.bfloat16)
    tensors[3] /= shrunk
    one, cases = SequenceLayout(lengths, 1), [(tensors, layout, RULES[-1], {})]
    ranks = run_on_ranks(on_world, layout.num_ranks, cases, backend=backend)
    parts = [found[0] for found in ranks]
    device = "cuda" if backend == "nccl" else "cpu"
    honest = results(tensors, one, block="eager", device=device)
    expected = oracle(tensors, one, True)
    for name, a, b, c in zip(NAMES, whole(layout, parts), expected, honest, strict=True):
        assert_within_budget(a, b, c.to(torch.bfloat16), what=name)


def test_within_budget_over_ranks() -> None:
    lengths = (90, 1, 37)
    check_within_budget(lengths, SequenceLayout(lengths, 3, "fold"), (4, 16, 8, 16, 24), 5)


@pytest.mark.gpu
@pytest.mark.parametrize("block", ["fa4", "cudnn", "flash"])
def test_within_budget_on_gpus(block: str) -> None:
    skip_unless_it_serves(block, 192, 128)
    check_budget(block, "cuda", (8, 128, 64, 128, 512), (700, 1, 4200))


@pytest.mark.multi_gpu
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_over_gpus(order) -> None:
    lengths = (700, 1, 77, 1300)
    layout, sizes = SequenceLayout(lengths, 2, order), (4, 128, 64, 128, 256)
    check_within_budget(lengths, layout, sizes, 16, backend="nccl")


def test_equal_to_ring_attention_of_its_keys_and_values() -> None:
    q, latent, _, weight, sinks = random_latents(11, SHAPES[0])
    ours = ring_latent_attention(q, latent, weight, sinks=sinks, scale=-0.3)
    theirs = ring_attention(q, *expanded(latent, weight, 6), sinks=sinks, scale=-0.3)
    for a, b in zip(ours, theirs):
        assert_equal_to_rounding(a, b)


def test_rows_of_a_batch() -> None:
    rows = [random_latents(5, SHAPES[0]) for _ in range(3)]
    weight, sinks = rows[0][3:]
    q, latent, doutput = (torch.stack([row[i] for row in rows]) for i in range(3))
    leaves = [x.requires_grad_() for x in (q, latent, weight, sinks)]
    output, lse = ring_latent_attention(*leaves[:3], sinks=leaves[3])
    gradients = torch.autograd.grad(output, leaves, doutput)
    layout = SequenceLayout((5,), 1)
    expected = [oracle([*row[:3], weight, sinks], layout, True) for row in rows]
    stacked = [torch.stack(x) for x in zip(*expected)]
    stacked[4:] = [x.sum(0) for x in stacked[4:]]
    for name, a, b in zip(NAMES, (output, lse, *gradients), stacked, strict=True):
        assert_equal_to_rounding(a.detach(), b, what=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operators_are_well_registered(dtype: torch.dtype) -> None:
    q, latent, _, weight, sinks = random_latents(12, SHAPES[0], dtype)
    tensors = [x.requires_grad_() for x in (q, latent.unsqueeze(1), weight)]
    settings = (torch.tensor([5, 7]), 1, "contiguous", "", True, (-1, -1), 0.3, "auto")
    arguments = (*tensors, sinks.requires_grad_(), *settings)
    torch.library.opcheck(torch.ops.ring.latent_attention.default, arguments)
    tensors = [x.detach() for x in tensors]
    found = torch.ops.ring.latent_attention(*tensors, None, *settings)
    arguments = (torch.randn_like(found[0]), None, *tensors, *found, *settings)
    torch.library.opcheck(torch.ops.ring.latent_attention_backward.default, arguments)


def test_one_graph() -> None:
    def loss(q: Tensor, latent: Tensor, weight: Tensor) -> Tensor:
        return ring_latent_attention(q, latent, weight).output.square().sum()

    q, latent, _, weight, _ = random_latents(12, SHAPES[0])
    leaves = [x.requires_grad_() for x in (q, latent, weight)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (6, 12)}, "q must be [T, H, K + P]"),
        ({"latent": (1, 6, 7)}, "q must be [T, H, K + P]"),
        ({"latent": (5, 7)}, "q must have the rows and tokens of latent"),
        ({"weight": (2, 7, 5)}, "and the heads of weight"),
        ({"latent": (0, 7), "q": (0, 3, 6)}, "must not be empty"),
        ({"weight": (3, 7, 8)}, "P -1"),
        ({"weight": (3, 4, 5)}, "V 0"),
        ({"latent": (6, 12)}, "K -1"),
        ({"q": torch.int64}, "q must be float16"),
        ({"weight": torch.float64}, "one dtype"),
        ({"window": (2, 2)}, "window must end at the query"),
        ({"sinks": torch.zeros(2)}, "sinks must be floating, [3]"),
        ({"block": "cpu_flash"}, "values as wide as keys"),
        ({"layout": SequenceLayout((7,), 1)}, "layout must hold the 6 tokens"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    shapes = {"q": (6, 3, 6), "latent": (6, 7), "weight": (3, 7, 5)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    ring_latent_attention(**tensors)
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            tensors[name] = tensors[name].to(value)
        elif name in tensors:
            tensors[name] = torch.ones(value)
    options = {name: value for name, value in change.items() if name not in shapes}
    with pytest.raises(ValueError) as error:
        ring_latent_attention(**tensors, **options)
    assert message in str(error.value)
