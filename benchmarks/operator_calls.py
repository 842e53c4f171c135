"""Calls of every operator, by what any commit offers, and a process that times them on request.

``before_after`` runs this file by its path, with one of two trees as the only place to import from:
it takes nothing of ``benchmarks``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Calls = dict[str, Callable[[], Any]]
BLOCK_MS = 20.0  # calls of one sample run about as long
CYCLES_PER_MS = 2_000_000  # of a Hopper GPU, at most


def directions(name: str, forward: Callable[..., Any], leaves: list[torch.Tensor]) -> Calls:
    """Forward without gradients, and forward with backward."""
    with torch.no_grad():
        do = torch.randn_like(forward(*leaves))

    def infer() -> None:
        with torch.no_grad():
            forward(*leaves)

    def both() -> None:
        torch.autograd.grad(forward(*leaves), leaves, do)

    return {f"{name} forward": infer, f"{name} both": both}


def tensors(device: str, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Leaves that want gradients."""
    return [torch.randn(s, device=device).bfloat16().requires_grad_() for s in shapes]


def lightning(name: str, heads: int, layer: int, *lengths: int, ranks: int, order: str) -> Calls:
    """Triton kernels of lightning attention over a pack."""
    import lasp

    layout = lasp.SequenceLayout(lengths, ranks, order)  # type: ignore[arg-type]
    rates = lasp.decay_rates(heads, layer, 80)
    leaves = tensors("cuda", *[(layout.num_local_tokens, heads, 128)] * 3)
    group = torch.distributed.group.WORLD if ranks > 1 else None
    return directions(
        name,
        lambda q, k, v: (
            lasp.lightning_attention(
                q, k, v, rates, layout=layout, cp_group=group, impl="triton",
                output_final_state=False,
            ).output
        ),
        leaves,
    )  # fmt: skip


def ring(name: str, *lengths: int, ranks: int, order: str) -> Calls:
    """Softmax attention of 64 query and 8 key heads."""
    import lasp
    from ring import ring_attention

    layout = lasp.SequenceLayout(lengths, ranks, order)  # type: ignore[arg-type]
    tokens = layout.num_local_tokens
    leaves = tensors("cuda", (tokens, 64, 128), (tokens, 8, 128), (tokens, 8, 128))
    group = torch.distributed.group.WORLD if ranks > 1 else None
    return directions(
        name,
        lambda q, k, v: ring_attention(q, k, v, layout=layout, cp_group=group).output,
        leaves,
    )


def experts(
    name: str, tokens: int, ranks: int, hidden: int = 6144, ffn: int = 9216, planted: float = 8.0
) -> Calls:
    """8 experts a rank, of MiniMax's width by default; a gate that sends tokens evenly."""
    import moe_parallel as moe

    num_experts = 8 * ranks
    groups = moe.ExpertTopology(ranks, ep=ranks).build_groups().experts if ranks > 1 else None
    config = moe.MoEConfig(hidden, ffn, num_experts, 2)
    chosen = {} if groups is None else {"groups": groups}
    layer = moe.ExpertParallelMoE(config, device="meta", dtype=torch.bfloat16, **chosen)
    layer.to_empty(device="cuda")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.01)
        gate = next(p for p in layer.parameters() if p.dim() == 2)
        gate.zero_()
        gate[:, :num_experts] = torch.eye(num_experts)
    (x,) = tensors("cuda", (tokens, hidden))
    token = torch.arange(tokens, device="cuda")
    with torch.no_grad():
        for slot in range(2):
            x[token, (token * 2 + slot) % num_experts] = planted + slot
    return directions(name, lambda x: layer(x).output, [x])


def layer_parts() -> Calls:
    """What lies around lightning attention, and decoding."""
    import lasp

    try:
        from lasp.layers.norm_gate import norm_gate
    except ModuleNotFoundError:  # a tree in which ``lasp.layers`` is one file
        from lasp.layers import norm_gate

    x, gate = tensors("cuda", *[(32768, 64, 128)] * 2)
    weight = torch.ones(64 * 128, device="cuda", dtype=torch.bfloat16)
    calls = directions(
        "norm and gate",
        lambda x, g: norm_gate(x.flatten(1), g.flatten(1), weight, eps=1e-5, impl="triton"),
        [x, gate],
    )
    q, k, v = (torch.randn(64, 1, 64, 128, device="cuda").bfloat16() for _ in range(3))
    state = torch.randn(64, 64, 128, 128, device="cuda")
    rates = lasp.decay_rates(64, 0, 80).cuda()
    calls["decode batch 64"] = lambda: lasp.lightning_decode(
        q, k, v, rates, state, in_place=True, impl="triton"
    )
    return calls


def builders(ranks: int) -> dict[str, Callable[[], Calls]]:
    """What makes the calls of each operator."""
    documents = tuple(16 + 37 * (i % 13) for i in range(300))
    few = (documents, (32768 * ranks,))
    order = "fold" if ranks > 1 else "contiguous"
    over = {"ranks": ranks, "order": order}
    made: dict[str, Callable[[], Calls]] = {
        "lightning layer 0": partial(lightning, "lightning H64 layer 0", 64, 0, *few[1], **over),
        "lightning layer 78": partial(lightning, "lightning H64 layer 78", 64, 78, *few[1], **over),
        "lightning pack": partial(lightning, "lightning H16 pack", 16, 40, *documents, **over),
        "ring one": partial(ring, "ring one document", 16384 * ranks, **over),
        "ring pack": partial(ring, "ring pack", *documents, **over),
        "experts": partial(experts, "experts", 8192, ranks),
        "experts Mixtral": partial(experts, "experts of Mixtral", 8192, ranks, 4096, 14336),
        "lightning host": partial(lightning, "host lightning", 8, 40, 256 * ranks, **over),
        "ring host": partial(ring, "host ring", 256 * ranks, **over),
        "experts host": partial(experts, "host experts", 256, ranks),
    }
    return made | ({"layer": layer_parts} if ranks == 1 else {})


def device_ms(call: Callable[[], Any], count: int, ahead_ms: float = 10.0) -> float:
    """Time of a call on the device, of so many behind each other.

    The device sleeps first for ``ahead_ms``, in which the host queues the calls: else the time of
    the host would be measured wherever it is the longer one.
    """
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(ahead_ms * CYCLES_PER_MS))
    first.record()
    for _ in range(count):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / count


def host_us(call: Callable[[], Any]) -> float:
    """Time until a call returns."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        call()
    taken = (time.perf_counter() - start) / 20 * 1e6
    torch.cuda.synchronize()
    return taken


def serve(ranks: int) -> None:
    """Build what is asked for, and time it; one JSON line each way."""
    rank = int(os.environ["RANK"])
    # Both trees on the same cores: of two cores of a virtual machine one can be half as fast.
    os.sched_setaffinity(0, {2 * rank, 2 * rank + 1})
    torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    if ranks > 1:
        torch.distributed.init_process_group("nccl")
    answers, sys.stdout = sys.stdout, sys.stderr
    calls: Calls = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            calls = builders(ranks)[request["build"]]()
            answer: Any = {name: calibrated(call) for name, call in calls.items()}
        elif request["time"].startswith("host"):
            answer = host_us(calls[request["time"]])
        else:
            answer = device_ms(calls[request["time"]], *request["settings"])
        print(json.dumps(answer), file=answers, flush=True)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def calibrated(call: Callable[[], Any]) -> tuple[int, float]:
    """How many calls a sample has, and for how long the device waits for the host."""
    for _ in range(3):
        call()
    count = max(3, min(40, round(BLOCK_MS / device_ms(call, 5))))
    return count, 10.0 + 1.5e-3 * host_us(call) * count


if __name__ == "__main__":
    serve(int(sys.argv[1]))
