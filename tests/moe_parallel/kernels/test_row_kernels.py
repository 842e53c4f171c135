"""Rows found and written by kernels, and how little a call queues before they are there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_parallel import MoEConfig, RouterConfig, TokenOrder
from moe_parallel import layer as layer_module
from moe_parallel.dispatch.padding import drop_by_rank, padded_order
from moe_parallel.dispatch.permute import RowOrder, permute, row_order
from moe_parallel.dispatch.planned import ChunkCounts
from moe_parallel.router import top_k
from moe_parallel.router.counts import Routing
from moe_parallel.router.route import route
from tests.moe_parallel.layers import build

pytest.importorskip("triton", reason="the kernels need triton, which has no wheel here")

from moe_parallel.kernels import router, slots_kernel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def several_programs() -> Iterator[None]:
    """Routings have several chunks each, from a hundred tokens on."""
    with patch.multiple(router, ROUTER_TILE=64, MAX_PROGRAMS=4, SCAN_COLUMNS=2, POSITIONS_TILE=32):
        yield


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "chosen"),
    [(0, 4, 2), (1, 1, 1), (100, 1, 1), (100, 5, 2), (8, 8, 2), (20, 9, 9), (9, 70, 3)],
)
def test_rows_are_those_of_plain_torch(
    tokens: int, num_experts: int, chosen: int, hot: bool, grouped: bool
) -> None:
    logits = torch.randn(tokens, num_experts, device=DEVICE)
    logits[:, -1] += 100 * hot
    positions_E = torch.randperm(num_experts, device=DEVICE) if grouped else None
    _, experts, _, histogram = router.top_k(logits, num_experts, chosen)
    size = (experts.numel(), num_experts)
    expected = row_order(experts, None, *size, positions_E=positions_E)
    how = {"histogram": histogram, "positions_E": positions_E, "with_ends": True}
    actual = row_order(experts, None, *size, **how)
    assert actual.row.dtype == torch.int64
    assert torch.equal(actual.row, expected.row)
    assert torch.equal(actual.assignment, expected.assignment)
    assert actual.row.flatten().sort()[0].tolist() == list(range(experts.numel()))
    if grouped or not tokens:
        assert actual.ends is None
    else:
        assert actual.ends.dtype == torch.int32
        counts = torch.bincount(experts.flatten(), minlength=num_experts)
        assert actual.ends.tolist() == counts.cumsum(0).tolist()


@pytest.mark.parametrize("sources", [(0,), (3, 1, 2)])
@pytest.mark.parametrize("experts", [range(1), range(2, 9)])
def test_chunks_are_ordered_as_by_plain_torch(experts: range, sources: tuple[int, ...]) -> None:
    kept_RE = torch.randint(0, 5, (4, 20), device=DEVICE)
    kept_RE[:, 8] = 2 * router.CHUNK_BLOCK * router.CHUNK_PARTS + 3  # every program twice
    kept_RE[1, 10:13] = 0
    sizes_SE = kept_RE[list(sources), 4 + experts.start : 4 + experts.stop]
    num_rows = int(sizes_SE.sum())
    for rows in (num_rows, None):
        expected, actual = (
            ChunkCounts(impl, kept_RE, sources, 4).order(experts, rows)
            for impl in ("eager", "triton")
        )
        assert actual.ends.dtype == expected.ends.dtype == torch.int32
        assert actual.ends.tolist() == sizes_SE.sum(0).cumsum(0).tolist()
        for one, other in zip(actual, expected):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert (actual.by_expert is None) == (rows is None)


def routed(impl: str, tokens: int = 100, **options: Any) -> Routing:
    torch.manual_seed(1)
    x = torch.randn(tokens, 16, device=DEVICE)
    gate = torch.randn(5, 16, device=DEVICE)
    gate[2] *= 3
    order = TokenOrder.contiguous([tokens])
    return route(x, gate, top_k=2, order=order, impl=impl, aux_loss_coefficient=0.1, **options)


@pytest.mark.parametrize("drop_policy", ["position", "probability"])
@pytest.mark.parametrize("capacity_factor", [None, 0.8])
def test_the_decision_does_not_depend_on_who_chooses(
    capacity_factor: float | None, drop_policy: str
) -> None:
    options = {"capacity_factor": capacity_factor, "drop_policy": drop_policy}
    plain, kernels = routed("eager", **options), routed("triton", **options)
    assert torch.equal(plain.experts, kernels.experts)
    assert torch.equal(plain.kept, kernels.kept)
    assert torch.equal(plain.logits, kernels.logits)
    assert plain.dropless == kernels.dropless == (capacity_factor is None)
    assert kernels.dropless == bool(kernels.kept.all())
    for one, other in zip([*plain.counts[:2], *plain.stats], [*kernels.counts[:2], *kernels.stats]):
        assert one.dtype == other.dtype == torch.int64
        assert torch.equal(one, other)
    assert (kernels.histogram is None) == (capacity_factor is not None)
    assert torch.equal(plain.aux_loss, kernels.aux_loss)


def orders() -> dict[str, RowOrder]:
    """Rows that all have a token, some assignments dropped, and padding."""
    routing = routed("eager")
    kept = torch.rand(100, 2, device=DEVICE) < 0.7
    kept[3] = False
    padded, number = drop_by_rank(routing, 45)
    assert padded.stats.dropped.any()
    return {
        "dropless": row_order(routing.experts, None, 200, 5),
        "dropped": row_order(routing.experts, kept, int(kept.sum()), 5),
        "padded": padded_order(routing.experts, number, 45, 5),
        "none kept": row_order(routing.experts, kept & False, 0, 5),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 40, 2100])
@pytest.mark.parametrize("name", ["dropless", "dropped", "padded", "none kept"])
def test_rows_are_written_as_by_plain_torch(name: str, width: int, dtype: torch.dtype) -> None:
    order = orders()[name]
    x = torch.randn(100, width, device=DEVICE).to(dtype)
    memory = torch.full((order.num_rows, width), torch.nan, device=DEVICE, dtype=dtype)
    placed = replace(order, place=lambda num_rows, like: memory[:num_rows])
    rows = permute(x, placed, "triton")
    assert rows.data_ptr() == memory.data_ptr()
    assert torch.equal(rows, permute(x, order, "eager"))
    assert (order.assignment < 0).any() == (name == "padded")


def test_tokens_that_are_not_contiguous() -> None:
    order = orders()["dropped"]
    x = torch.randn(40, 100, device=DEVICE).T
    assert torch.equal(permute(x, order, "triton"), permute(x, order, "eager"))


# ---- how much is queued ------------------------------------------------------------------------

FREE = {  # neither memory is read nor written
    "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute",
    "select", "slice", "split", "t", "transpose", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip


class Queued(TorchDispatchMode):
    """Names of what a GPU would be given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self._paused and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))

    def one(self, name: str, function: Any) -> Any:
        """A function that is one launch, whatever it does here."""

        def launched(*args: Any, **kwargs: Any) -> Any:
            self.names.append(name)
            self._paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self._paused = False

        return launched

    def kernel(self, module: Any, name: str) -> Any:
        """The kernel of a module, likewise."""
        kernel = getattr(module, name)
        launches = type(
            "Launches", (), {"__getitem__": lambda _, grid: self.one(name, kernel[grid])}
        )
        return patch.object(module, name, launches())


BIASED = RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=4, top_groups=2)


@pytest.mark.parametrize("router_config", [RouterConfig(), BIASED], ids=["default", "biased"])
def test_few_launches_until_rows_leave_and_in_the_routers_backward(
    router_config: RouterConfig,
) -> None:
    sizes = {"aux_loss_coefficient": 0.0, "impl": "triton", "overlap_groups": 2}
    config = MoEConfig(16, 8, 8, 2, **sizes, router=router_config)
    layer = build(config, torch.bfloat16, False).to(DEVICE).eval()  # no load is counted
    x = torch.randn(40, 16, device=DEVICE).bfloat16().requires_grad_()
    queued = Queued()

    def leave() -> Routing:
        order = layer.agreed_order(x, None)
        tokens = order.take(x, layer.mesh.token_rank)
        routing = layer.gate(tokens, order)
        layer.through_experts(tokens, routing, order)
        return routing

    stages = ("split", "top_k", "before", "row", "top_k_backward")
    patches = [queued.kernel(router, f"{stage}_kernel") for stage in stages]
    patches += [
        queued.kernel(slots_kernel, "copy_slots_kernel"),
        patch.object(top_k, "takes_parts", lambda _: True),
        patch.object(top_k, "parts_product", queued.one("mm", top_k.parts_product)),
        patch.object(layer.experts, "forward", lambda rows, *_, **__: rows),
        patch.object(layer_module, "unpermute", lambda rows, *_: rows),
    ]
    for each in patches:
        each.start()
    try:
        leave()  # once for all: the places of experts
        queued.names.clear()
        with queued:
            routing = leave()
        to_host = ["copy_"] if DEVICE == "cuda" else []
        choice = ["split_kernel", "mm", "top_k_kernel", "before_kernel", *to_host]
        assert queued.names == [
            *choice,
            "row_kernel",
            "copy_slots_kernel",
        ]  # and on several ranks the gather
        queued.names.clear()
        grad = torch.randn_like(routing.weights)
        with queued:
            torch.autograd.grad(routing.weights, [x, layer.gate.weight], grad)
        backward = ["top_k_backward_kernel", "split_kernel", "mm", "mm", "add", "add"]
        assert queued.names == backward
    finally:
        for each in reversed(patches):
            each.stop()
