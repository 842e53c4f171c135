"""How much of the experts' communication is left to be seen?

Exposed communication of a layer in G groups of experts, by time medians of calls that take turns::

    E = (t(G groups) - t(1 group, nothing sent)) / t(only what is sent, 1 group)

``nothing sent`` is the same layer with every all-to-all of the experts left out: rows come from a
buffer of the same shape. ``only sent`` is those all-to-alls back to back, without products. E of
one group is what a layer without overlap shows, about 1. The router, its counts and the copy to
the host are in all of them. Routing is planted: each expert gets as many tokens from every rank.
``tokens once`` sends a token to a rank once, whatever number of its experts live there; its time is
to be compared, but has no E, for it sends something else.
``copied`` is through ``moe_parallel.SymmetricMemory``, and compared with the layer whose ranks wait
for each other and copy nothing, ``nothing copied``, and with copies alone, ``only copied``.

Where E is smaller than the spread of a run, two other metrics of the layer by its rule tell more.
``saved_ms`` is the time that it saves over one group. ``overlapped`` is, from a trace, the share of
the time of transfers during which a product runs, on the rank where it is least. With ``copied``
every copy on the device counts as a transfer. A CPU has no trace.

Baselines: one group of experts; two groups of *tokens*, the scheme of MiniMax-01's figure 9, with
the same pipeline; experts cut over all ranks (ETP alone), which is plain tensor parallelism; and
the layer of Megatron-Core and LigerCute's experts, where they are installed
(``benchmarks.moe_megatron``, ``benchmarks.moe_liger``). ``bare products`` are
the experts' matrix products and nothing else, the bound of the other times.

``--router ling`` is another router: sigmoid scores, 4 of 8 groups, a bias; and one shared expert,
whose products are not in the bound.
``--max-ctas`` limits the thread blocks of EP's communicator: 1 or 2 make NVLink as slow as a
network. A sample is as in ``benchmarks.timing``.

Run: torchrun --nproc-per-node 2 -m benchmarks.moe_overlap --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import harness, moe_liger, moe_megatron
from benchmarks.harness import Machine, RankOptions, Row, say
from benchmarks.moe_cases import (
    BARE,
    COPIED,
    SENT,
    SILENT,
    Case,
    RouterName,
    Way,
    bare_products,
    build,
    exact_results,
    inputs,
    only_sent,
    ways,
)
from benchmarks.timing import Timed, bounded, most
from benchmarks.trace_parts import kernels, under_products
from moe_parallel import ExpertGroups, ExpertParallelMoE, ExpertTopology, SymmetricMemory
from moe_parallel.dispatch import make_dispatcher

TRACED = 4  # calls, behind each other
RULE = "lasp, by the rule"
# The names of what travels, sent and copied.
TRAVELS = ("nccl", r"nccl|Memcpy (PtoP|DtoD)")


@dataclass(kw_only=True)
class Options(RankOptions):
    """Options; ``meshes``, each EPxETP, stand instead of all."""

    tokens: tuple[int, ...] = (8192, 32768)
    hidden: int = 6144
    ffn: int = 9216
    experts: int = 32
    top_k: int = 2
    router: RouterName = "softmax"
    max_ctas: tuple[int, ...] = (0, 2)
    meshes: tuple[str, ...] = ()


def calls(
    layer: ExpertParallelMoE,
    every: Mapping[str, Way],
    x: Tensor,
    grad: Tensor,
    *,
    memory: SymmetricMemory | None = None,
    backward: bool,
) -> dict[str, Timed]:
    """Forward, or forward and backward, of every way; and parts of them alone."""

    def call(way: Way) -> None:
        output = way.forward(x)
        if backward:
            torch.autograd.grad(output, [x, *way.parameters], grad, allow_unused=True)

    timed = {name: Timed(partial(call, way), way.in_force) for name, way in every.items()}
    for name, used in ((SENT, None), (COPIED, memory)):
        if name == SENT or used is not None:
            dispatcher = make_dispatcher(layer.mesh, layer.groups, used)
            timed[name] = Timed(only_sent(layer, x, 1 + backward, dispatcher))
    timed[BARE] = Timed(bare_products(layer, x, backward=backward))
    return timed


def measure(
    case: Case,
    layer: ExpertParallelMoE,
    groups: ExpertGroups,
    machine: Machine,
    memory: SymmetricMemory | None = None,
) -> Iterator[Row]:
    """Rows of times, bound by the bare products, and of the share of communication exposed."""
    x, grad = inputs(case, machine)
    ours = ways(layer, machine, memory)
    others = moe_megatron.peers(case, layer, groups, machine)
    others |= moe_liger.peers(case, layer, machine, x, grad)
    row = partial(harness.row, "moe_overlap", case.facts | {"ranks": dist.get_world_size()})
    for direction in ("forward", "both"):
        backward = direction == "both"
        timed = calls(layer, ours | others, x, grad, memory=memory, backward=backward)
        medians = {}
        bound = (BARE, 1.0, BARE)
        for found in bounded(row, f"{direction}_ms", timed, machine, bound, (SENT, COPIED)):
            medians[found["impl"]] = found["p50"]
            yield found
        for name in ours:
            if name not in SILENT and ours[name].sends_assignments and (groups.ep or groups.etp):
                copied = name.endswith("copied")
                alone = medians[COPIED if copied else SENT]
                share = (medians[name] - medians[SILENT[copied]]) / alone
                yield row(name, f"{direction}_exposed", share, "share")
        if groups.ep or groups.etp:
            for name in (name for name in ours if name.startswith(RULE)):
                one_group = medians[name.replace(RULE, "lasp 1 groups")]
                yield row(name, f"{direction}_saved_ms", one_group - medians[name], "ms")
                if machine.device == "cuda":
                    share = overlapped(timed[name], TRAVELS[name.endswith("copied")], machine)
                    yield row(name, f"{direction}_overlapped", share, "share")


def overlapped(timed: Timed, pattern: str, machine: Machine) -> float:
    """The share of the time of kernels of this pattern beside a product, on the worst rank."""
    flag = torch.zeros(1, device=machine.device)

    def traced() -> None:
        dist.all_reduce(flag)  # not every rank starts to trace at the same time
        torch.cuda.synchronize()
        for _ in range(TRACED):
            timed.call()

    with timed.in_force:
        _, *spans = sorted(kernels(traced), key=lambda span: span.start)
    return 1 - most(1 - under_products(spans, pattern), machine)[0]


def check(
    case: Case, groups: ExpertGroups, machine: Machine, memory: SymmetricMemory | None = None
) -> dict[str, float]:
    """Output and input gradient of each way against a loop in float64.

    Returns:
        By peer, the largest difference of its output from ours, over all ranks.
    """
    layer = build(case, groups, machine)
    x, grad = inputs(case, machine)
    exact = exact_results(case, layer, x, grad, machine)
    ours = ways(layer, machine, memory)
    peers = moe_megatron.peers(case, layer, groups, machine)
    first, differences = None, {}
    for name, way in (ours | peers).items():
        if name in SILENT:
            continue
        with way.in_force:
            actual = harness.results(way.forward, [x], grad)
        harness.check(name, actual, exact)
        first = actual[0] if first is None else first
        if name in peers:
            (differences[name],) = most((actual[0] - first).abs().max().item(), machine)
    return differences


@contextmanager
def groups_of(case: Case) -> Iterator[ExpertGroups]:
    """The communicators of a case, gone after it."""
    topology = ExpertTopology(dist.get_world_size(), ep=case.ep, etp=case.etp)
    made, mine = [], {}
    for axis in ("ep", "etp"):
        for ranks in topology.groups(axis):
            if len(ranks) > 1:
                options = None
                if dist.get_backend() == "nccl":
                    # Rows others wait for overtake products that are queued.
                    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
                    if axis == "ep" and case.max_ctas:
                        options.config.max_ctas = case.max_ctas
                group = dist.new_group(list(ranks), pg_options=options)
                made.append(group)
                if dist.get_rank() in ranks:
                    mine[axis] = group
    block = dist.group.WORLD if len(mine) == 2 else None
    yield ExpertGroups(dist.group.WORLD, mine.get("ep"), mine.get("etp"), block)
    for group in made:
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)


def memory_of(case: Case, groups: ExpertGroups) -> SymmetricMemory | None:
    """The memory of the ranks that share experts, where rows are copied too."""
    shared = groups.ep_etp or groups.ep or groups.etp
    # Copies know no limit of thread blocks.
    copied = dist.get_backend() == "nccl" and shared is not None and not case.max_ctas
    return SymmetricMemory(shared) if copied else None


def cases(options: Options, ranks: int) -> list[Case]:
    """Every mesh: all EP, all ETP, and from 4 ranks on half of each; only EP is throttled."""
    meshes = [(ranks, 1), (1, ranks)] + [(ranks // 2, 2)] * (ranks >= 4)
    if options.meshes:
        meshes = [tuple(map(int, mesh.split("x"))) for mesh in options.meshes]
    return [
        Case(tokens, options.hidden, options.ffn, options.experts, options.top_k, ep, etp, ctas,
             options.router)
        for tokens in options.tokens for ep, etp in meshes for ctas in options.max_ctas
        if ctas == 0 or ep > 1
    ]  # fmt: skip


def rows(options: Options, machine: Machine) -> Iterator[Row]:
    """Check each case, small, then measure it."""
    for peer, name in ((moe_megatron, "Megatron-Core's layer"), (moe_liger, "LigerCute's experts")):
        if (reason := peer.obstacle()) is not None:
            say(f"left out: {name}: {reason}")
    if machine.device == "cpu":
        say("left out: the share overlapped: traces are of a GPU")
    for case in cases(options, dist.get_world_size()):
        with groups_of(case) as groups:
            hidden = max(64, case.experts)  # the gate reads an expert off each of the first ones
            small = case._replace(tokens=8 * case.experts, hidden=hidden, ffn=128)
            memory = memory_of(case, groups)
            for name, difference in check(small, groups, machine, memory).items():
                say(f"{name}: its output and ours differ by {difference:.1e} at most")
            layer = build(case, groups, machine, on_device=True)
            yield from measure(case, layer, groups, machine, memory)


QUESTION = harness.Question("moe_overlap", Options, rows)

if __name__ == "__main__":
    harness.answer(QUESTION, __doc__)
