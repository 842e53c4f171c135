"""The cases of ``moe_overlap``, and every way of ours to compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import Machine, draw, results
from benchmarks.token_groups import token_groups
from moe_parallel import (
    ExpertGroups,
    ExpertParallelMoE,
    MoEConfig,
    RouterConfig,
    SymmetricMemory,
    TokenOrder,
)
from moe_parallel.config import Send
from moe_parallel.dispatch import all_to_all, make_dispatcher
from moe_parallel.dispatch.dispatcher import Dispatcher, RowTransfer
from moe_parallel.dispatch.plan import Splits
from moe_parallel.dispatch.stream_memory import CudaStreamMemory
from moe_parallel.experts.gemm import backward_product, forward_product, weight_product
from moe_parallel.pipeline.groups import expert_groups
from moe_parallel.pipeline.pipeline import Pipeline
from moe_parallel.reference import reference_moe

PLANTED = 4.0  # what a token's features say of its experts, against features of size 1
SILENT = ("nothing sent", "nothing copied")
RouterName = Literal["softmax", "ling"]
SENT, COPIED, BARE = "only sent", "only copied", "bare products"


class Case(NamedTuple):
    """What is measured; ``tokens`` are those of a rank."""

    tokens: int
    hidden: int = 6144
    ffn: int = 9216
    experts: int = 32
    top_k: int = 2
    ep: int = 1
    etp: int = 1
    max_ctas: int = 0
    router: RouterName = "softmax"

    @property
    def config(self) -> MoEConfig:
        """The settings of the layer; ``ling``: as models of that family have them."""
        config = MoEConfig(self.hidden, self.ffn, self.experts, self.top_k)
        if self.router == "softmax":
            return config
        sigmoid = RouterConfig("sigmoid", scaling=2.5, expert_bias=True, num_groups=8, top_groups=4)
        return replace(config, router=sigmoid, shared_ffn_size=self.ffn)

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of it; the router where it is not the default."""
        plain = self.router == "softmax"
        return {k: v for k, v in self._asdict().items() if k != "router" or not plain}


class Way(NamedTuple):
    """One way to compute the layer: what to call, its parameters, what is in force meanwhile."""

    forward: Callable[[Tensor], Tensor]
    parameters: Iterable[Tensor]
    in_force: AbstractContextManager[Any] = nullcontext()
    sends_assignments: bool = True  # as those in which nothing is sent


def build(
    case: Case,
    groups: ExpertGroups,
    machine: Machine,
    *,
    on_device: bool = False,
    static_shapes: bool = False,
) -> ExpertParallelMoE:
    """A layer whose gate reads a token's experts off its first features.

    The layer's own initial values are the same for any ranks, and drawn on the CPU: about a minute
    for the experts of a GPU. With ``on_device`` they are drawn where they are, on each rank others.
    """
    device = "meta" if on_device else machine.device
    config = replace(case.config, static_shapes=static_shapes)
    layer = ExpertParallelMoE(config, groups=groups, device=device, dtype=machine.dtype)
    if on_device:
        layer.to_empty(device=machine.device)
    with torch.no_grad():
        if on_device:
            seed = dist.get_rank() if dist.is_initialized() else 0
            generator = torch.Generator(machine.device).manual_seed(seed)
            std = (2 / (case.hidden + case.ffn)) ** 0.5
            for weight in layer.parameters():
                weight.normal_(0, std, generator=generator)
            for buffer in layer.buffers():
                buffer.zero_()
        layer.gate.weight.zero_()
        layer.gate.weight[:, : case.experts] = torch.eye(case.experts)
    return layer


def inputs(case: Case, machine: Machine) -> tuple[Tensor, Tensor]:
    """Hidden states that choose every expert alike, and the gradient of the output."""
    wide = machine._replace(dtype=torch.float32)
    x, grad = draw(wide, *[(case.tokens, case.hidden)] * 2)
    x[:, : case.experts] *= 0.1
    token = torch.arange(case.tokens, device=machine.device)
    for slot in range(case.top_k):
        x[token, (token * case.top_k + slot) % case.experts] = PLANTED + slot
    return x.to(machine.dtype).requires_grad_(), grad.to(machine.dtype)


def exact_results(
    case: Case, layer: ExpertParallelMoE, x: Tensor, grad: Tensor, machine: Machine
) -> list[Tensor]:
    """Output and input gradient of a loop in float64, with the weights of ``layer``.

    The layer has its own initial values, see :func:`build`.
    """
    whole = ExpertParallelMoE(case.config, dtype=torch.float64)
    w13, w2 = (w.detach().to(machine.dtype).double() for w in whole.experts.parameters())
    shared = () if layer.shared is None else tuple(layer.shared.parameters())
    shared = tuple(w.detach().double().cpu() for w in shared)
    gate, exact_x, exact_grad = (t.detach().double().cpu() for t in (layer.gate.weight, x, grad))

    def loop(x: Tensor) -> Tensor:
        return reference_moe(
            x, gate, w13, w2, top_k=case.top_k, capacity_factor=None, drop_policy="position",
            aux_loss_coefficient=0.0, router=case.config.router, shared=shared,
        ).output  # fmt: skip

    return results(loop, [exact_x], exact_grad)


def nothing_sent(machine: Machine) -> Any:
    """In its block no row of experts travels: what would arrive is there."""
    arrived: dict[int, Tensor] = {}

    def start(
        rows: Tensor, splits: Splits, group: dist.ProcessGroup, into: Tensor | None = None
    ) -> RowTransfer:
        count = sum(splits.receive)
        if into is None and len(arrived.get(rows.shape[1], ())) < count:
            arrived[rows.shape[1]] = torch.randn(
                count, rows.shape[1], device=machine.device, dtype=rows.dtype
            )
        there = arrived[rows.shape[1]][:count] if into is None else into
        return RowTransfer(there, rows)

    return patch.object(all_to_all, "start_all_to_all", start)


def nothing_copied() -> Any:
    """In its block ranks wait for each other as ever; rows are what was there before."""
    return patch.object(CudaStreamMemory, "copy", lambda *_: None)


def only_sent(
    layer: ExpertParallelMoE, x: Tensor, times: int, dispatcher: Dispatcher
) -> Callable[[], None]:
    """A call that sends the rows of one group, ``times`` there and back."""
    rows = x.detach().repeat(layer.config.top_k, 1)
    per_rank = [[len(rows) // layer.config.num_experts] * layer.config.num_experts]
    counts = per_rank * layer.mesh.num_token_ranks
    experts = expert_groups(layer.experts.num_local, 1)
    sent = dispatcher.start_call(lambda: counts, experts, most_rows=len(rows), like=rows)

    def call() -> None:
        for _ in range(times):
            Pipeline(sent).run(rows, lambda g, arrived: arrived)

    return call


def bare_products(layer: ExpertParallelMoE, x: Tensor, *, backward: bool) -> Callable[[], None]:
    """A call of nothing but the matrix products of this rank's experts."""
    experts, num_rows = layer.experts, x.shape[0] * layer.config.top_k * layer.mesh.etp_size
    counts = [num_rows // experts.num_local] * experts.num_local
    gemm = experts.chosen_gemm(num_rows)
    w13, w2 = experts.w13.detach().flatten(1, 2), experts.w2.detach()
    rows, hidden, act = (
        torch.randn(sum(counts), width, device=x.device, dtype=x.dtype)
        for width in (x.shape[1], w13.shape[1], w2.shape[2])
    )
    dw13, dw2 = torch.empty_like(w13), torch.empty_like(w2)

    def call() -> None:
        forward_product(rows, w13, counts, gemm)
        forward_product(act, w2, counts, gemm)
        if backward:
            backward_product(rows, w2, counts, gemm)
            backward_product(hidden, w13, counts, gemm)
            weight_product(hidden, rows, counts, gemm, dw13)
            weight_product(rows, act, counts, gemm, dw2)

    return call


def ways(
    layer: ExpertParallelMoE, machine: Machine, memory: SymmetricMemory | None = None
) -> dict[str, Way]:
    """Ours by name: in groups of experts, in two groups of tokens, and with nothing sent.

    Tokens that cross to a rank once have a name of their own where there is no ETP; the rule takes
    them or assignments.
    """

    @cache
    def order_of(num_tokens: int) -> TokenOrder:  # one for all calls, as models have
        return TokenOrder.contiguous([num_tokens] * layer.mesh.num_token_ranks)

    def in_groups(
        num_groups: int | None, dispatcher: Dispatcher, x: Tensor, send: Send = "assignments"
    ) -> Tensor:
        layer.config = replace(layer.config, overlap_groups=num_groups, send=send)
        layer.dispatcher = dispatcher
        return layer(x, token_order=order_of(len(x))).output

    most, parameters = layer.experts.num_local, tuple(layer.parameters())
    found = {}
    for copied in [False] if memory is None else [False, True]:
        how, used = (", copied", memory) if copied else ("", None)
        dispatcher = make_dispatcher(layer.mesh, layer.groups, used)
        for g in sorted({1, 2, max(1, most // 2), most}):
            found[f"lasp {g} groups{how}"] = Way(partial(in_groups, g, dispatcher), parameters)
        sends: dict[str, Send] = {"by the rule": "auto"}
        if layer.mesh.ep_size > 1 and layer.mesh.etp_size == 1:
            sends["tokens once"] = "tokens"
        for name, send in sends.items():
            chosen = partial(in_groups, None, dispatcher, send=send)
            found[f"lasp, {name}{how}"] = Way(chosen, parameters, sends_assignments=False)
        silent = nothing_copied() if copied else nothing_sent(machine)
        found[SILENT[copied]] = Way(partial(in_groups, 1, dispatcher), parameters, silent)
    if layer.shared is None:  # groups of tokens have no router but the default
        found["2 token groups"] = Way(partial(token_groups, layer), parameters)
    return found
