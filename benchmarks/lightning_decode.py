"""What does the next token cost, for one sequence and for a batch?

The floor of a step is its bytes over the bandwidth of a device copy measured in the same process:
every state read and written, q, k, v and o. For one sequence that is less than a launch, so the
time of an empty kernel, measured alike, is added to it there. Lengths of the past do not occur: the
state is all there is of it. ``host_us`` is the time until a call returns, against that of the empty
kernel; in a CUDA graph it is not paid.

Baselines: the same step in plain torch, and FLA's ``fused_recurrent_simple_gla`` if
flash-linear-attention is installed, which writes new states beside the old ones.

Run: python -m benchmarks.lightning_decode --commit $(git rev-parse HEAD)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from benchmarks.harness import copy_bytes_per_s, environment, graph_ms, measure_ms, write_rows
from lasp import decay_rates, lightning_decode

HEAD_DIM, LAYERS = 128, 80


class Case(NamedTuple):
    """What is measured."""

    batch: int
    heads: int = 64
    tokens: int = 1


CASES = [
    *(Case(batch) for batch in (1, 8, 32, 128, 512)),
    Case(32, tokens=4),
    Case(1, heads=8),
    Case(256, heads=8),
]

# q, k, v, rates on the device and state to the output; the state may change or not.
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def triton_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """The kernel."""
    return lightning_decode(q, k, v, rates, state, in_place=True, impl="triton").output


def eager_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """Plain torch."""
    return lightning_decode(q, k, v, rates, state, in_place=True, impl="eager").output


def fla_step(q: Tensor, k: Tensor, v: Tensor, rates: Tensor, state: Tensor) -> Tensor:
    """The peer."""
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    return fused_recurrent_simple_gla(
        q, k, v, g_gamma=-rates, scale=1.0, initial_state=state, output_final_state=True
    )[0]


@triton.jit
def empty_kernel(x):
    """Nothing."""


def make_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k and v are views of a fused projection."""
    fused = torch.randn(case.batch, case.tokens, case.heads, 3 * HEAD_DIM, device="cuda")
    q, k, v = fused.bfloat16().split(HEAD_DIM, dim=-1)
    rates = decay_rates(case.heads, 0, LAYERS).cuda()
    return q, k, v, rates, torch.randn(case.batch, case.heads, HEAD_DIM, HEAD_DIM, device="cuda")


def check(name: str, step: Step) -> None:
    """Right before fast: against plain torch in float64."""
    q, k, v, rates, state = make_inputs(Case(5, 4, tokens=3))
    exact = eager_step(*(x.double() for x in (q, k, v, rates, state)))
    error = ((step(q, k, v, rates, state).double() - exact).norm() / exact.norm()).item()
    print(f"{name}: relative error {error:.1e}", flush=True)
    if not error < 1e-2:
        raise SystemExit(f"{name} is wrong here")


def host_us(fn: Callable[[], Any]) -> float:
    """Time until a call returns, where the device is not waited for."""
    calls = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            fn()
        calls.append((time.perf_counter() - start) / 20)
    return sorted(calls)[len(calls) // 2] * 1e6


def measure(case: Case, impl: str, step: Step, bandwidth: float, empty: Step) -> list[dict]:
    """Rows of the time on the device, the share of the bandwidth, and the time on the host."""
    inputs = make_inputs(case)
    *qkv, _, state = inputs
    num_bytes = 2 * state.numel() * 4 + 4 * qkv[0].numel() * 2
    bound, name = num_bytes / bandwidth * 1e3, "bytes at copy bandwidth"
    if case.batch == 1:
        bound += measure_ms(lambda: empty(*inputs))[1]
        name = "empty kernel and bytes at copy bandwidth"
    p20, p50, p80 = measure_ms(lambda: step(*inputs))
    base = {
        "benchmark": "lightning_decode",
        "impl": impl,
        "case": case._asdict() | {"head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "samples": None,
    }
    times = {"p20": p20, "p50": p50, "p80": p80, "unit": "ms", "bound": bound, "bound_name": name}
    rows = [base | {"metric": "step_ms"} | times]
    if case.batch == 1:
        own, bound = (host_us(lambda fn=fn: fn(*inputs)) for fn in (step, empty))
        times = {"p20": None, "p50": own, "p80": None, "unit": "us"}
        times |= {"bound": bound, "bound_name": "empty kernel"}
        rows.append(base | {"metric": "host_us"} | times)
        if impl == "lasp triton":
            replay, bound = (graph_ms(lambda fn=fn: fn(*inputs)) for fn in (step, empty))
            times = {"p20": replay[0], "p50": replay[1], "p80": replay[2], "unit": "ms"}
            times |= {"bound": bound[1] + num_bytes / bandwidth * 1e3}
            times |= {"bound_name": "empty kernel in a graph and bytes at copy bandwidth"}
            rows.append(base | {"metric": "graph_step_ms"} | times)
    return rows


def main() -> None:
    """Measure everything and append each row as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    steps = {"lasp triton": triton_step, "lasp eager": eager_step}
    if importlib.util.find_spec("fla"):
        version = importlib.metadata.version("flash-linear-attention")
        steps[f"fla {version} fused_recurrent_simple_gla"] = fla_step
    common, bandwidth = environment(options.commit), copy_bytes_per_s()

    def empty(q: Tensor, *_: Tensor) -> Tensor:
        empty_kernel[(1,)](q)
        return q

    for impl, step in steps.items():
        check(impl, step)
        for case in CASES:
            for row in measure(case, impl, step, bandwidth, empty):
                path = write_rows([row | common], options.out)
                print(f"{impl:12} {case} {row['metric']:8} {row['p50']:9.4f}"
                      f" = {row['p50'] / row['bound']:.2f} x {row['bound_name']}",
                      flush=True)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
