"""A picture of generation: the next token by context, and prompts, by ratio of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PANELS = {  # what is drawn over what, and the rows: of layers, or sums by ratio
    "a step of one layer, ms": ("context", "step_ms", False),
    "a step of 16 layers by lightning to softmax layers, ms": ("context", "step_ms", True),
    "prefill of 16 layers with experts, ms": ("prompt", "prefill_ms", True),
}


def draw_lines(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels, logarithmic: layers and sums over the context, sums over the prompt.

    Args:
        title: above the picture.
        rows: of one run of ``benchmarks.generation``.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    for ax, (name, (over, metric, by_ratio)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items()
    ):
        lines: dict[str, dict[int, float]] = {}
        for row in rows:
            case = row["case"]
            if row["metric"] == metric and over in case and ("ratio" in case) == by_ratio:
                lines.setdefault(case.get("ratio", row["impl"]), {})[case[over]] = row["p50"]
        for label, points in lines.items():
            ordered = sorted(points.items())
            ax.plot(*zip(*ordered), marker="o", markersize=3, label=label)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(title=name, xlabel=f"tokens of the {over}")
        ax.grid(alpha=0.3)
        if lines:
            ax.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
