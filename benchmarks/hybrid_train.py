"""How fast does a hybrid model train, from short contexts to a million tokens, and in what memory?

The layer group of ``benchmarks.layer_group``, seven lightning layers and a softmax layer, or eight
softmax layers, over one document or a pack with a long tail; context parallel over all ranks, and
experts dealt out to them. ``forward_backward`` is that of bfloat16 parameters; ``step`` one of
training: ``lasp.hybrid.parallelize``, gradients reduced in the backward, clipped, and AdamW. With
``--graph`` one GPU replays ``forward_backward`` as one CUDA graph: short batches wait for the host.
With ``--copies`` rows travel to experts by copy engines. Routers are ``even``, as trained ones are
(``benchmarks.even_routers``); ``--routers drawn`` leaves them as they are drawn. With ``--impls
lasp megatron`` the same model as Megatron's takes turns (``benchmarks.hybrid_megatron``).

Rows of a case: milliseconds of the slowest rank, bound by the operations of
``benchmarks.model_flops`` at the rate that a product of 8192 x 8192 matrices has in the same
process; tokens/s and TFLOP/s a GPU; peak memory of the fullest GPU; with ``--trace`` the shares of
the GPU's time by kernels and how much communication nothing hides. The loss is that of
``HybridModel(labels=...)``, whatever ``--vocab-size``. One call warms up; a sample begins with a
barrier, and one is taken however long it lasts.

Run: torchrun --nproc-per-node 2 -m benchmarks.hybrid_train --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import hybrid_megatron, trace_parts
from benchmarks.even_routers import make_even
from benchmarks.harness import Machine, Question, RankOptions, Row, answer, pack_lengths, row
from benchmarks.hybrid_megatron import MegatronHybrid
from benchmarks.layer_group import layer_group, quick_model
from benchmarks.lightning_length import flops_per_s
from benchmarks.model_flops import step_flops
from benchmarks.timing import most
from lasp.hybrid import (
    HybridConfig,
    HybridModel,
    PackedBatch,
    StepGraph,
    keep_activations,
    pack_batch,
)
from lasp.hybrid.parallel import parallelize
from lasp.sequence.planner import plan_layout
from moe_parallel import ExpertTopology, SymmetricMemory, clip_grad_norm_, parameter_groups

Impl = Literal["lasp", "megatron", "megatron_logits"]
PATTERNS = {"hybrid": "7:1", "softmax": "0:1"}
TAIL_TOKENS = 4096  # a document of the long-tail pack, in the mean


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options; ``tokens`` of all ranks, ``seconds`` the most for the samples of a case."""

    tokens: tuple[int, ...] = (32768, 65536)
    models: tuple[str, ...] = ("hybrid", "softmax")
    documents: tuple[str, ...] = ("one", "tail")
    parts: tuple[str, ...] = ("forward_backward",)
    activations: tuple[str, ...] = ("none",)
    impls: tuple[Impl, ...] = ("lasp",)
    vocab_size: int = 1024
    routers: Literal["even", "drawn"] = "even"
    hidden_size: int = 2048
    experts: int = 32
    samples: int = 5
    seconds: float = 60.0
    trace: bool = False
    graph: bool = False
    copies: bool = False


class Case(NamedTuple):
    """What is measured; ``tokens`` are those of all ranks."""

    model: str
    tokens: int
    documents: str
    part: str
    activations: str
    vocab_size: int
    routers: str
    ranks: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the documents of the pack."""
        count = 1 if self.documents == "one" else max(2, self.tokens // TAIL_TOKENS)
        return pack_lengths(self.tokens, count)


def build(
    case: Case, config: HybridConfig, machine: Machine, impl: Impl, *, copies: bool = False
) -> HybridModel | MegatronHybrid:
    """The model, as its part needs it."""
    topology = ExpertTopology(case.ranks, cp=case.ranks, ep=case.ranks)
    alone = case.ranks == 1 and case.part == "forward_backward"
    groups = None if alone else groups_of(topology)
    memory = memory_of(topology) if copies else None
    model = quick_model(config, machine.device, machine.dtype, groups, memory)
    for _, parameter in model.dense_parameters():
        dist.broadcast(parameter.detach(), 0)
    if case.routers == "even":
        batch, tokens, labels = batch_of(case, machine)
        make_even(model, lambda: model(tokens, batch, labels=labels))
    if impl != "lasp":
        return MegatronHybrid(model, machine, impl, case.activations, memory)
    if case.part == "step":
        model.float()
        low = machine.dtype if machine.dtype != torch.float32 else None
        return parallelize(model, topology, activations=case.activations, param_dtype=low)
    keep_activations(model, case.activations)
    return model


@cache
def groups_of(topology: ExpertTopology) -> Any:
    """The process groups, made once."""
    return topology.build_groups()


@cache
def memory_of(topology: ExpertTopology) -> SymmetricMemory:
    """The memory through which rows are copied to experts, made once."""
    return SymmetricMemory(groups_of(topology).experts.ep)


def batch_of(case: Case, machine: Machine) -> tuple[PackedBatch, Tensor, Tensor]:
    """Layout, tokens and labels of this rank."""
    lengths = case.lengths
    order = plan_layout(lengths, case.ranks).order
    batch = pack_batch([lengths], dp_rank=0, num_ranks=case.ranks, order=order)
    generator = torch.Generator().manual_seed(0)
    pack = torch.randint(case.vocab_size, (case.tokens + 1,), generator=generator)
    mine = (batch.layout.shard(part, dist.get_rank()) for part in (pack[:-1], pack[1:]))
    tokens, labels = (part.to(machine.device) for part in mine)
    return batch, tokens, labels


def step_of(
    case: Case, model: HybridModel | MegatronHybrid, machine: Machine, *, graph: bool
) -> Callable[[], Tensor]:
    """A call of the part that is measured; returns the loss, this rank's share."""
    batch, tokens, labels = batch_of(case, machine)
    optimizer = None
    if case.part == "step":
        optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-5)

    def loss_of(tokens: Tensor, labels: Tensor) -> Tensor:
        output = model(tokens, batch, labels=labels)
        loss: Tensor = output.loss / case.tokens + output.aux_loss
        return loss

    if graph:
        return partial(StepGraph(model, loss_of, tokens, labels).step, tokens, labels)

    def call() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss = loss_of(tokens, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        if optimizer is not None:
            clip_grad_norm_(model, 1.0, model.groups)
            optimizer.step()
        return loss.detach()

    return call


def step_ms(call: Callable[[], Any], machine: Machine) -> list[float]:
    """Times by the slowest rank, sorted; one sample is always taken."""
    on_gpu, flag = machine.device == "cuda", torch.zeros(1, device=machine.device)
    times: list[float] = []
    while len(times) < machine.samples and sum(times) < 1e3 * machine.seconds:
        if on_gpu:
            torch.cuda.synchronize()
        dist.all_reduce(flag)
        if on_gpu:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
        times += most(1e3 * (time.perf_counter() - begun), machine)
    return sorted(times)


def measure(
    case: Case, config: HybridConfig, machine: Machine, rate: float, options: Options, impl: Impl
) -> Iterator[Row]:
    """Rows of a case."""
    options_told = {"CUDA graph": options.graph, "rows copied": options.copies}
    name = "lasp" if impl == "lasp" else hybrid_megatron.name_of(impl)
    who = ", ".join([name, *(name for name, given in options_told.items() if given)])
    make = partial(row, "hybrid_train", case._asdict(), who)
    model = build(case, config, machine, impl, copies=options.copies)
    on_gpu = machine.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    call = step_of(case, model, machine, graph=options.graph)
    loss = call()
    if not math.isfinite(loss.item()):
        raise SystemExit(f"{case}: the loss is {loss.item()}")
    times = step_ms(call, machine)
    flops = step_flops(config, case.lengths).total / case.ranks
    bound = {"bound": 1e3 * flops / rate, "bound_name": "operations at the rate of a product"}
    yield make("ms", times, "ms", **bound)
    median = times[round((len(times) - 1) / 2)]
    yield make("tokens_per_s", 1e3 * case.tokens / case.ranks / median, "tokens/s/GPU")
    yield make("tflops", flops / median / 1e9, "TFLOP/s/GPU")
    yield make("gemm_share", 1e3 * flops / rate / median, "share")
    if on_gpu:
        peak = most(torch.cuda.max_memory_allocated() / 1e9, machine)
        yield make("peak_memory", peak[0], "GB")
    if on_gpu and options.trace:
        for part, share in trace_parts.shares(trace_parts.kernels(call)).items():
            yield make(part, share, "share")


def cases(options: Options, ranks: int) -> Iterator[Case]:
    """All that the options name, short ones first."""
    for tokens, documents, model, part, activations in product(
        sorted(options.tokens),
        options.documents,
        options.models,
        options.parts,
        options.activations,
    ):
        if model == "softmax":  # which has no other attention
            activations = activations.replace("attention_outputs", "softmax_outputs")
        sizes = (options.vocab_size, options.routers, ranks)
        yield Case(model, tokens, documents, part, activations, *sizes)


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Rows of every case."""
    hybrid_megatron.check(options.impls, options.parts, options.activations, graph=options.graph)
    rate = flops_per_s() if machine.device == "cuda" else 1e10
    for case, impl in product(cases(options, dist.get_world_size()), options.impls):
        config = layer_group(
            PATTERNS[case.model],
            hidden_size=options.hidden_size,
            num_experts=options.experts,
            vocab_size=case.vocab_size,
        )
        yield from measure(case, config, machine, rate, options, impl)
        gc.collect()  # what wrappers hold in cycles
        if machine.device == "cuda":
            torch.cuda.empty_cache()


QUESTION = Question("hybrid_train", Options, rows, high_priority=True)

if __name__ == "__main__":
    answer(QUESTION, __doc__)
