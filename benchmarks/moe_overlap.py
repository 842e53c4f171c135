"""How much of the experts' communication is left to be seen?

Exposed communication of a layer in G groups of experts, by time medians of calls that take turns::

    E = (t(G groups) - t(1 group, nothing sent)) / t(only what is sent, 1 group)

``nothing sent`` is the same layer with every all-to-all of the experts left out: rows come from a
buffer of the same shape. ``only sent`` is those all-to-alls back to back, without products. E of
one group is what a layer without overlap shows, about 1. The router, its counts and the copy to
the host are in all of them. Routing is planted: each expert gets as many tokens from every rank.

Baselines: one group of experts; two groups of *tokens*, the scheme of MiniMax-01's figure 9, with
the same pipeline; experts cut over all ranks (ETP alone), which is plain tensor parallelism.

``--max-ctas`` limits the thread blocks of EP's communicator: 1 or 2 make NVLink as slow as a
network. A sample is as in ``benchmarks.lasp_ranks``.

Run: torchrun --nproc-per-node 2 -m benchmarks.moe_overlap --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.harness import write_rows
from benchmarks.lasp_ranks import Machine, Timed, samples_ms, surroundings
from benchmarks.token_groups import token_groups
from moe_parallel import ExpertGroups, ExpertParallelMoE, ExpertTopology, MoEConfig, Timeline
from moe_parallel.overlap import Pipeline, Transfer, plan_pipeline
from moe_parallel.reference import reference_moe

PLANTED = 4.0  # what a token's features say of its experts, against features of size 1


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

    @property
    def config(self) -> MoEConfig:
        """Of the layer."""
        return MoEConfig(self.hidden, self.ffn, self.experts, self.top_k)


def build(case: Case, groups: ExpertGroups, machine: Machine) -> ExpertParallelMoE:
    """A layer whose gate reads a token's experts off its first features."""
    layer = ExpertParallelMoE(
        case.config, groups=groups, device=machine.device, dtype=machine.dtype
    )
    with torch.no_grad():
        layer.gate_weight.zero_()
        layer.gate_weight[:, : case.experts] = torch.eye(case.experts)
    return layer


def inputs(case: Case, machine: Machine) -> tuple[Tensor, Tensor]:
    """Hidden states that choose every expert alike, and the gradient of the output."""
    generator = torch.Generator(machine.device).manual_seed(dist.get_rank())
    x, grad = (
        torch.randn(case.tokens, case.hidden, generator=generator, device=machine.device)
        for _ in range(2)
    )
    x[:, : case.experts] *= 0.1
    token = torch.arange(case.tokens, device=machine.device)
    for slot in range(case.top_k):
        x[token, (token * case.top_k + slot) % case.experts] = PLANTED + slot
    return x.to(machine.dtype).requires_grad_(), grad.to(machine.dtype)


def nothing_sent(machine: Machine) -> Any:
    """In its block no row of experts travels: what would arrive is there."""
    arrived: dict[int, Tensor] = {}

    def start(
        self: Pipeline,
        lane: str,
        name: str,
        g: int,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        into: Tensor | None = None,
    ) -> Transfer:
        count = sum(receive)
        if into is None and len(arrived.get(rows.shape[1], ())) < count:
            arrived[rows.shape[1]] = torch.randn(
                count, rows.shape[1], device=machine.device, dtype=rows.dtype
            )
        there = arrived[rows.shape[1]][:count] if into is None else into
        return Transfer(there, rows, None)

    return patch.object(Pipeline, "start", start)


def only_sent(layer: ExpertParallelMoE, x: Tensor, times: int) -> None:
    """The all-to-alls of one group, ``times`` times there and back, on rows as they come."""
    rows = x.detach().repeat(layer.config.top_k, 1)
    per_rank = [[len(rows) // layer.config.num_experts] * layer.config.num_experts]
    counts = per_rank * layer.mesh.num_token_ranks
    experts, plans = plan_pipeline(counts, layer.mesh, row_bytes=1, num_groups=1)
    pipeline = Pipeline(experts, plans, layer.groups.ep, layer.groups.etp)
    for _ in range(times):
        pipeline.run(rows, lambda g, arrived: arrived)


def variants(layer: ExpertParallelMoE) -> dict[str, tuple[int | None, str]]:
    """Name, number of groups and kind of each call."""
    most = layer.experts.num_local
    counts = sorted({1, 2, max(1, most // 2), most})
    named = {f"lasp {g} groups": (g, "expert") for g in counts}
    return {**named, "2 token groups": (2, "token"), "nothing sent": (1, "silent")}


def calls(
    layer: ExpertParallelMoE, x: Tensor, grad: Tensor, machine: Machine, *, backward: bool
) -> dict[str, Timed]:
    """Forward, or forward and backward, of every variant; and only what they send."""
    leaves = [x, *layer.parameters()]

    def call(num_groups: int | None, forward: Callable[[Tensor], Tensor]) -> None:
        layer.config = replace(layer.config, overlap_groups=num_groups)
        output = forward(x)
        if backward:
            torch.autograd.grad(output, leaves, grad, allow_unused=True)

    timed = {}
    for name, (num_groups, kind) in variants(layer).items():
        forward = partial(token_groups, layer) if kind == "token" else lambda x: layer(x).output
        in_force = nothing_sent(machine) if kind == "silent" else nullcontext()
        timed[name] = Timed(partial(call, num_groups, forward), in_force)
    timed["only sent"] = Timed(partial(only_sent, layer, x, 2 if backward else 1))
    return timed


def measure(case: Case, groups: ExpertGroups, machine: Machine) -> Iterator[dict[str, Any]]:
    """Rows of times, and of the share of communication that is exposed."""
    layer = build(case, groups, machine)
    x, grad = inputs(case, machine)
    for direction in ("forward", "both"):
        times = samples_ms(calls(layer, x, grad, machine, backward=direction == "both"), machine)
        medians = {name: values[len(values) // 2] for name, values in times.items()}
        for name, values in times.items():
            yield row(case, name, f"{direction}_ms", values, "ms")
        silent, sent = medians["nothing sent"], medians["only sent"]
        for name, median in medians.items():
            if name not in ("nothing sent", "only sent") and groups != ExpertGroups():
                yield row(case, name, f"{direction}_exposed", [(median - silent) / sent], "share")


def row(case: Case, impl: str, metric: str, values: list[float], unit: str) -> dict[str, Any]:
    """Percentiles of sorted values."""
    p20, p50, p80 = (values[round(share * (len(values) - 1))] for share in (0.2, 0.5, 0.8))
    return {
        "benchmark": "moe_overlap", "impl": impl,
        "case": case._asdict() | {"ranks": dist.get_world_size()}, "metric": metric,
        "p20": p20, "p50": p50, "p80": p80, "unit": unit, "bound": None, "bound_name": None,
        "samples": len(values),
    }  # fmt: skip


def check(case: Case, groups: ExpertGroups, machine: Machine) -> None:
    """Right before fast: output and input gradient of each variant against a loop in float64."""
    layer = build(case, groups, machine)
    x, grad = inputs(case, machine)
    whole = ExpertParallelMoE(case.config, dtype=torch.float64)
    w13, w2 = (w.detach().to(machine.dtype).double() for w in whole.experts.parameters())
    exact_x = x.detach().double().cpu().requires_grad_()
    gate = layer.gate_weight.detach().double().cpu()
    exact = reference_moe(
        exact_x, gate, w13, w2,
        top_k=case.top_k, capacity_factor=None, drop_policy="position", aux_loss_coefficient=0.0,
    ).output  # fmt: skip
    exact_grad = torch.autograd.grad(exact, exact_x, grad.double().cpu())[0]
    for name, (num_groups, kind) in variants(layer).items():
        if kind == "silent":
            continue
        layer.config = replace(layer.config, overlap_groups=num_groups)
        output = token_groups(layer, x) if kind == "token" else layer(x).output
        actual = (output.detach(), torch.autograd.grad(output, x, grad)[0])
        for what, got, true in zip(("output", "dx"), actual, (exact.detach(), exact_grad)):
            error = ((got.double().cpu() - true).norm() / true.norm()).item()
            if not error < 1e-2:
                raise SystemExit(f"{name} is wrong here: {what}, relative error {error:.1e}")


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
    return parser.parse_args()


def cases(options: argparse.Namespace, ranks: int) -> list[Case]:
    """Every mesh; only EP is throttled."""
    meshes = [(ranks, 1), (1, ranks)] + [(ranks // 2, 2)] * (ranks >= 4)
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
    machine = Machine(options.device, "triton" if on_gpu else "eager", dtype, options.samples)
    common = surroundings(options.commit, machine)
    first = dist.get_rank() == 0
    for case in cases(options, dist.get_world_size()):
        with groups_of(case) as groups:
            small = case._replace(tokens=8 * case.experts, hidden=64, ffn=128)
            check(small, groups, machine)
            for result in measure(case, groups, machine):
                if first:
                    write_rows([result | common], options.out)
                    print(*case, result["impl"], result["metric"], f"{result['p50']:.4g}",
                          flush=True)  # fmt: skip
            timeline = Timeline()
            layer, (x, grad) = build(case, groups, machine), inputs(case, machine)
            layer(x, timeline=timeline).output.backward(grad)
            if first:
                print(timeline, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
