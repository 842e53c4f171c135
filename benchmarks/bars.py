"""A picture of rows with bounds: how many times its bound each call takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = {"forward_ms": "forward", "both_ms": "forward and backward"}


def draw_bars(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Bars by case, one for each implementation; forward, and forward and backward.

    Args:
        title: above the picture.
        rows: of one run and benchmark; those without a bound are left out.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    bounded = [row for row in rows if row["bound"] and row["metric"] in METRICS]
    keys = list(dict.fromkeys(key for row in bounded for key in row["case"]))
    varying = [k for k in keys if len({json.dumps(row["case"].get(k)) for row in bounded}) > 1]

    def name(row: dict[str, Any]) -> str:
        return ", ".join([*(f"{key} {row['case'].get(key)}" for key in varying), row["impl"]])

    names = list(dict.fromkeys(map(name, bounded)))
    colors = {impl: f"C{i}" for i, impl in enumerate(dict.fromkeys(r["impl"] for r in bounded))}
    figure = Figure(figsize=(15, 1 + 0.22 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for ax, (metric, label) in zip(panels, METRICS.items()):
        for row in (row for row in bounded if row["metric"] == metric):
            ratio = row["p50"] / row["bound"]
            ax.barh(names.index(name(row)), ratio, color=colors[row["impl"]])
            ax.text(ratio, names.index(name(row)), f" {ratio:.2f}", va="center", fontsize=7)
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(title=f"{label}, times its bound")
        ax.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
