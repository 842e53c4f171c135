"""The figures that README and docs/performance.md begin with: ours, a baseline, where the rows are.

Each compares two medians of one run, the newest that has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from benchmarks.drawing import plain
from benchmarks.harness import Row, markdown


class Side(NamedTuple):
    """One median: what it is called, and the fields of its rows."""

    name: str
    impl: str
    case: Mapping[str, Any]


class Headline(NamedTuple):
    """One line of the table; ``case`` is that of both sides."""

    what: str
    benchmark: str
    metric: str
    unit: str
    case: Mapping[str, Any]
    ours: Side
    baseline: Side


HEADLINES = (
    Headline(
        "training 8 layers of a 7:1 hybrid with experts, 256K tokens, 2 GPUs",
        "hybrid_train", "tokens_per_s", "tokens/s a GPU",
        {"tokens": 262144, "documents": "one", "part": "forward_backward"},
        Side("hybrid", "lasp", {"model": "hybrid"}),
        Side("all softmax", "lasp", {"model": "softmax"}),
    ),
    Headline(
        "lightning attention forward, 256K tokens, 16 heads of 128",
        "lightning_length", "forward_ms", "ms", {"tokens": 262144, "head_dim": 128},
        Side("ours", "lasp triton", {}),
        Side("softmax by cuDNN", "torch softmax cudnn", {}),
    ),
    Headline(
        "ring attention, one document of 64K tokens over 2 GPUs, forward and backward",
        "ring_length", "both_ms", "ms", {"tokens": 32768, "causal": True},
        Side("ours", "ring", {}),
        Side("ring_flash_attn 0.1.8", "ring_flash_attn 0.1.8 zigzag", {}),
    ),
    Headline(
        "experts of MiniMax-01 over 2 GPUs, 32K tokens each, forward and backward",
        "moe_overlap", "both_ms", "ms",
        {"tokens": 32768, "experts": 32, "ep": 2, "etp": 1, "max_ctas": 0},
        Side("ours", "lasp, groups by the rule, copied", {}),
        Side(
            "Megatron-Core 0.19.2",
            "Megatron-Core 0.19.2 alltoall, SequentialMLP, fused SwiGLU", {},
        ),
    ),
    Headline(
        "lightning attention backward, 128K tokens, 64 heads of 128",
        "lightning_kernels", "backward_ms", "ms",
        {"tokens": 131072, "heads": 64, "head_dim": 128, "layer_index": 0},
        Side("ours", "lasp triton", {}),
        Side("FLA 0.6.0", "fla 0.6.0 chunk_simple_gla", {}),
    ),
    Headline(
        "the next token after 4M tokens, 16 layers",
        "generation", "step_ms", "ms", {"context": 4194304, "layers": 16},
        Side("hybrid 7:1", "sum of layers", {"ratio": "7:1"}),
        Side("all softmax", "sum of layers", {"ratio": "all softmax"}),
    ),
)  # fmt: skip


def median(rows: list[Row], headline: Headline, side: Side) -> float | None:
    """That of one side, if it was measured; of several cases the better."""
    wanted = {**headline.case, **side.case}
    found = [
        row["p50"]
        for row in rows
        if (row["impl"], row["metric"]) == (side.impl, headline.metric)
        and all(row["case"].get(key) == value for key, value in wanted.items())
    ]
    best = max if headline.metric == "tokens_per_s" else min
    return best(found) if found else None


def headlines(runs: Mapping[Any, list[Row]], tables: str, most: int | None = None) -> str:
    """The table of all or of the first; ``tables`` is the folder of the pages that it links to."""
    body = []
    for headline in HEADLINES[:most]:
        for run, rows in runs.items():
            ours, other = (
                median(rows, headline, side) for side in (headline.ours, headline.baseline)
            )
            if run.benchmark != headline.benchmark or ours is None or other is None:
                continue
            times = ours / other if headline.metric == "tokens_per_s" else other / ours
            device = run.device.removeprefix("NVIDIA ").split()[0]
            body.append([
                headline.what,
                f"{headline.ours.name}: {plain(ours)} {headline.unit}",
                f"{headline.baseline.name}: {plain(other)}",
                f"[{plain(times)} x, {device}]({tables}/{headline.benchmark}.md)",
            ])  # fmt: skip
            break
    return "\n".join(markdown(["measured", "", "baseline", "rows"], body, range(4))) + "\n"
