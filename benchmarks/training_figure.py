"""What the figure of ``hybrid_train`` shows: the fastest policy of each model at each context."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.drawing import Series, short
from benchmarks.harness import Row

# Seconds of a step of 1,048,576 tokens on 8 H100: github.com/huggingface/trl, pull request 6845.
PUBLISHED_S = {"TRL, Qwen3-8B": 364, "TRL, Qwen3-30B-A3B": 483}


class Trained(NamedTuple):
    """The fastest policy of a model at a context: its case, and medians by metric."""

    case: Mapping[str, Any]
    metrics: dict[str, float]


def fastest(rows: list[Row]) -> dict[tuple[str, int], Trained]:
    """By model and tokens: forward and backward over one document."""
    found: dict[tuple[str, int, str], Trained] = {}
    for row in rows:
        case = row["case"]
        what = (case["part"], case["documents"], row["impl"], case["vocab_size"])
        if what == ("forward_backward", "one", "lasp", 1024):
            key = (case["model"], case["tokens"], json_of(case))
            found.setdefault(key, Trained(case, {})).metrics[row["metric"]] = row["p50"]
    names = {"hybrid": "hybrid 7:1", "softmax": "all softmax"}
    best: dict[tuple[str, int], Trained] = {}
    for (model, tokens, _), trained in found.items():
        known = best.setdefault((names[model], tokens), trained)
        if trained.metrics["tokens_per_s"] > known.metrics["tokens_per_s"]:
            best[names[model], tokens] = trained
    return best


def trained(metric: str) -> Callable[[list[Row]], Series]:
    """Forward and backward of the two models over one document, the fastest policy of each."""

    def series(rows: list[Row]) -> Series:
        found: dict[str, dict[Any, float]] = {}
        for (name, tokens), best in sorted(fastest(rows).items()):
            if metric in best.metrics:
                found.setdefault(name, {})[tokens] = best.metrics[metric]
        if metric == "tokens_per_s" and any(2**20 in curve for curve in found.values()):
            found |= {name: {2**20: 2**20 / 8 / seconds} for name, seconds in PUBLISHED_S.items()}
        return found

    return series


def json_of(case: Mapping[str, Any]) -> str:
    """A key of the case."""
    return repr(sorted(case.items()))


def training_note(rows: list[Row]) -> str:
    """What the titles leave out."""
    used: dict[int, set[int]] = {}
    recomputed: set[int] = set()
    for (_, tokens), best in fastest(rows).items():
        used.setdefault(best.case["ranks"], set()).add(tokens)
        if best.case["activations"] != "none":
            recomputed.add(tokens)
    where = "; ".join(
        f"{', '.join(map(short, sorted(tokens)))} on {ranks} GPU{'s' * (ranks > 1)}"
        for ranks, tokens in sorted(used.items())
    )
    again = ", ".join(map(short, sorted(recomputed)))
    text = (
        f"Forward and backward of 8 layers of width 2048, 32 experts, bfloat16;\n{where}"
        + f"; at {again} layers keep their softmax attention alone" * bool(again)
    )
    if max(map(max, used.values()), default=0) >= 2**20:
        text += (
            "\nTRL, as published, not measured here: whole steps of larger models, all softmax (36"
            " dense layers of hidden size 4096; 48 with 128 experts of hidden size 2048), on 8 H100"
        )
    return text
