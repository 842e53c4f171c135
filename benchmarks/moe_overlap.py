"""How much of the experts' communication is left to be seen?

Exposed communication of a layer in G groups of experts, by time medians of calls that take turns::

    E = (t(G groups) - t(1 group, nothing sent)) / t(only what is sent, 1 group)

``nothing sent`` is the same layer with every all-to-all of the experts left out: rows come from a
buffer of the same shape. ``only sent`` is those all-to-alls back to back, without products. E of
one group is what a layer without overlap shows, about 1. The router, its counts and the copy to
the host are in all of them. Routing is planted: each expert gets as many tokens from every rank.
``copied`` is through ``moe_parallel.SymmetricMemory``, and compared with the layer whose ranks wait
for each other and copy nothing, ``nothing copied``, and with copies alone, ``only copied``.

Baselines: one group of experts; two groups of *tokens*, the scheme of MiniMax-01's figure 9, with
the same pipeline; experts cut over all ranks (ETP alone), which is plain tensor parallelism; and
the layer of Megatron-Core, if it is installed (``benchmarks.moe_megatron``). ``bare products`` are
the experts' matrix products and nothing else, the bound of the other times.

``--max-ctas`` limits the thread blocks of EP's communicator: 1 or 2 make NVLink as slow as a
network. A sample is as in ``benchmarks.lasp_ranks``.

Run: torchrun --nproc-per-node 2 -m benchmarks.moe_overlap --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import moe_megatron
from benchmarks.harness import write_rows
from benchmarks.lasp_ranks import Machine, Timed, most, samples_ms, surroundings
from benchmarks.moe_cases import (
    BARE,
    COPIED,
    SENT,
    SILENT,
    Case,
    Way,
    bare_products,
    build,
    inputs,
    only_sent,
    ways,
)
from moe_parallel import (
    ExpertGroups,
    ExpertParallelMoE,
    ExpertTopology,
    SymmetricMemory,
    Timeline,
)
from moe_parallel.dispatch import make_dispatcher
from moe_parallel.reference import reference_moe


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
    times = 2 if backward else 1
    for name, used in ((SENT, None), (COPIED, memory)):
        if name == SENT or used is not None:
            dispatcher = make_dispatcher(layer.mesh, layer.groups, used)
            timed[name] = Timed(only_sent(layer, x, times, dispatcher))
    timed[BARE] = Timed(bare_products(layer, x, backward=backward))
    return timed


def measure(
    case: Case,
    layer: ExpertParallelMoE,
    groups: ExpertGroups,
    machine: Machine,
    memory: SymmetricMemory | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of times, bound by the bare products, and of the share of communication exposed."""
    x, grad = inputs(case, machine)
    ours = ways(layer, machine, memory)
    others = moe_megatron.peers(case, layer, groups, machine)
    for direction in ("forward", "both"):
        backward = direction == "both"
        timed = calls(layer, ours | others, x, grad, memory=memory, backward=backward)
        times = samples_ms(timed, machine)
        medians = {name: values[len(values) // 2] for name, values in times.items()}
        for name, values in times.items():
            result = row(case, name, f"{direction}_ms", values, "ms")
            if name not in (BARE, SENT, COPIED):
                result |= {"bound": medians[BARE], "bound_name": BARE}
            yield result
        for name in ours:
            if name not in SILENT and (groups.ep or groups.etp):
                copied = name.endswith("copied")
                alone = medians[COPIED if copied else SENT]
                share = (medians[name] - medians[SILENT[copied]]) / alone
                of_medians = {"p20": None, "p80": None, "samples": None}
                yield row(case, name, f"{direction}_exposed", [share], "share") | of_medians


def row(case: Case, impl: str, metric: str, values: list[float], unit: str) -> dict[str, Any]:
    """Percentiles of sorted values."""
    p20, p50, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.5, 0.8))
    return {
        "benchmark": "moe_overlap", "impl": impl,
        "case": case._asdict() | {"ranks": dist.get_world_size()}, "metric": metric,
        "p20": p20, "p50": p50, "p80": p80, "unit": unit, "bound": None, "bound_name": None,
        "samples": len(values),
    }  # fmt: skip


def check(
    case: Case, groups: ExpertGroups, machine: Machine, memory: SymmetricMemory | None = None
) -> dict[str, float]:
    """Right before fast: output and input gradient of each way against a loop in float64.

    Returns:
        By peer, the largest difference of its output from ours, over all ranks.
    """
    layer = build(case, groups, machine)
    x, grad = inputs(case, machine)
    whole = ExpertParallelMoE(case.config, dtype=torch.float64)
    w13, w2 = (w.detach().to(machine.dtype).double() for w in whole.experts.parameters())
    exact_x = x.detach().double().cpu().requires_grad_()
    gate = layer.gate.weight.detach().double().cpu()
    exact = reference_moe(
        exact_x, gate, w13, w2,
        top_k=case.top_k, capacity_factor=None, drop_policy="position", aux_loss_coefficient=0.0,
    ).output  # fmt: skip
    exact_grad = torch.autograd.grad(exact, exact_x, grad.double().cpu())[0]
    ours = ways(layer, machine, memory)
    peers = moe_megatron.peers(case, layer, groups, machine)
    first, differences = None, {}
    for name, way in (ours | peers).items():
        if name in SILENT:
            continue
        with way.in_force:
            output = way.forward(x)
            actual = (output.detach(), torch.autograd.grad(output, x, grad)[0])
        for what, got, true in zip(("output", "dx"), actual, (exact.detach(), exact_grad)):
            error = ((got.double().cpu() - true).norm() / true.norm()).item()
            if not error < 1e-2:
                raise SystemExit(f"{name} is wrong here: {what}, relative error {error:.1e}")
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


def parse() -> argparse.Namespace:
    """Options; the meshes are all EP, all ETP, and from 4 ranks on half of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--ffn", type=int, default=9216)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--max-ctas", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=math.inf, help="for a metric of a case")
    parser.add_argument("--meshes", nargs="+", metavar="EPxETP", help="instead of all")
    return parser.parse_args()


def cases(options: argparse.Namespace, ranks: int) -> list[Case]:
    """Every mesh; only EP is throttled."""
    meshes = [(ranks, 1), (1, ranks)] + [(ranks // 2, 2)] * (ranks >= 4)
    if options.meshes:
        meshes = [tuple(map(int, mesh.split("x"))) for mesh in options.meshes]
    return [
        Case(tokens, options.hidden, options.ffn, options.experts, options.top_k, ep, etp, ctas)
        for tokens in options.tokens for ep, etp in meshes for ctas in options.max_ctas
        if ctas == 0 or ep > 1
    ]  # fmt: skip


def main() -> None:
    """Check, then measure; every row is written when it is there."""
    options = parse()
    on_gpu = options.device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    dtype = torch.bfloat16 if on_gpu else torch.float32
    impl = "triton" if on_gpu else "eager"
    machine = Machine(options.device, impl, dtype, options.samples, options.seconds)
    common = surroundings(options.commit, machine)
    first = dist.get_rank() == 0
    if first and (reason := moe_megatron.obstacle()) is not None:
        print(f"left out: Megatron-Core's layer: {reason}")
    for case in cases(options, dist.get_world_size()):
        with groups_of(case) as groups:
            small = case._replace(tokens=8 * case.experts, hidden=64, ffn=128)
            memory = memory_of(case, groups)
            for name, difference in check(small, groups, machine, memory).items():
                if first:
                    print(f"{name}: its output and ours differ by {difference:.1e} at most")
            layer = build(case, groups, machine, on_device=True)
            for result in measure(case, layer, groups, machine, memory):
                if first:
                    write_rows([result | common], options.out)
                    print(*case, result["impl"], result["metric"], f"{result['p50']:.4g}",
                          flush=True)  # fmt: skip
            timeline = Timeline()
            x, grad = inputs(case, machine)
            layer.config = case.config  # groups by the rule
            layer.dispatcher = make_dispatcher(layer.mesh, groups, memory)
            layer(x, timeline=timeline).output.backward(grad)
            if first:
                print(timeline, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
