"""How figures look: panels side by side, lines with their names at their ends, bars with theirs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Mapping[str, Mapping[Any, float]]

# One color a family of implementations, in every figure; the first pattern that matches.
COLORS = {
    r"TRL, Qwen3-8B": "#6b6b6b",
    r"TRL": "#b5b5b5",
    r"all softmax|softmax layer|cudnn|one rank|whole pack|bare|plain tensor": "#e8871e",
    r"flash 2|3:1": "#f2b872",
    r"ttention 1|no exchange|one group|one_hop|cut experts": "#9aa0a6",
    r"^fla\b|15:1|^sliced$": "#3ca951",
    r"Megatron|head parallel": "#a463f2",
    r"llama3|LASP-2|token groups|^scan$": "#ff725c",
    r"ring_flash_attn|^LASP$|all lightning": "#9c6b4e",
    r"NCCL|eager": "#7fa3e8",
    r"": "#2f5fd0",  # ours
}
MOST_SERIES = 6
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "lasp",  # the same bytes from the same rows
}


def color(name: str) -> str:
    """That of its family."""
    return next(value for pattern, value in COLORS.items() if re.search(pattern, name))


def short(tokens: float) -> str:
    """4K, 5.3K, 1M."""
    return f"{tokens / 2**20:.3g}M" if tokens >= 2**20 else f"{tokens / 2**10:.3g}K"


def plain(y: float) -> str:
    """Three digits without an exponent: 0.25, 93, 50K."""
    return f"{y / 1000:.3g}K" if y >= 10_000 else f"{float(f'{y:.3g}'):g}"


class Drawn(NamedTuple):
    """A panel with its values.

    Attributes:
        title: with the unit.
        series: values by implementation and case.
        bars: by case, with numbers; else lines over a number.
        log: whether values have a logarithmic axis.
        axis: what lines go over.
    """

    title: str
    series: Series
    bars: bool
    log: bool
    axis: str


def spread(places: Sequence[float], least: float) -> list[float]:
    """Places moved apart so that neighbours are ``least`` apart, in their order."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for _ in range(200):
        close = [(a, b) for a, b in pairwise(order) if moved[b] - moved[a] < least - 1e-9]
        for a, b in close:
            middle = (moved[a] + moved[b]) / 2
            moved[a], moved[b] = middle - least / 2, middle + least / 2
        if not close:
            break
    return moved


def draw_lines(ax: Axes, panel: Drawn) -> None:
    """Lines whose names stand at their right ends."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    points = sorted({x for values in panel.series.values() for x in values})
    for name, values in panel.series.items():
        ax.plot(list(values), list(values.values()), marker="o", markersize=4, color=color(name))
    ax.set_xscale("log", base=2)
    if panel.log:
        ax.set_yscale("log")
        values = [y for of in panel.series.values() for y in of.values()]
        few = max(values) < 8 * min(values)  # then 1, 2 and 5 would be one tick or two
        ax.yaxis.set_major_locator(LogLocator(subs=range(1, 10) if few else (1, 2, 5), numticks=8))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: plain(y)))
    else:
        ax.set_ylim(bottom=0)
    labels = [short(x) if points[-1] >= 2**10 else f"{x:g}" for x in points]
    step = max(1, math.ceil(len(points) / 6))
    shown = list(range(len(points) - 1, -1, -step))[::-1]
    ax.set_xticks([points[i] for i in shown], [labels[i] for i in shown])
    ax.minorticks_off()
    ax.set_xlabel(panel.axis)
    ax.grid(alpha=0.25)
    ends = [(name, max(values), values[max(values)]) for name, values in panel.series.items()]
    heights = [ax.transAxes.inverted().transform(ax.transData.transform(e[1:]))[1] for e in ends]
    for (name, x, y), height in zip(ends, spread(heights, 0.07)):
        ax.annotate(
            name, (x, y), xytext=(1.03, height), textcoords="axes fraction", va="center",
            color=color(name), fontsize=10,
            arrowprops={"arrowstyle": "-", "color": color(name), "alpha": 0.35, "linewidth": 0.8},
        )  # fmt: skip


def draw_bars(ax: Axes, panel: Drawn, *, named: bool) -> None:
    """Bars by case, with numbers and, if ``named``, names: a panel beside has the same ones."""
    cases = list(dict.fromkeys(case for values in panel.series.values() for case in values))
    top = max(value for values in panel.series.values() for value in values.values())
    place, ticks = 0.0, []
    for case in cases:
        measured = [(name, values[case]) for name, values in panel.series.items() if case in values]
        if len(measured) > 1:
            if named:
                ax.text(0, place, case, fontsize=10, weight="bold", va="center")
            place += 1
        for name, value in measured:
            ax.barh(place, value, height=0.8, color=color(name))
            ax.text(value, place, f" {plain(value)}", va="center", fontsize=10)
            ticks.append((place, name, name if len(measured) > 1 else case))
            place += 1
        place += 0.4 * (len(measured) > 1)
    texts = [text if named else "" for *_, text in ticks]
    ax.set_yticks([place for place, *_ in ticks], texts, fontsize=10)
    for label, (_, name, _) in zip(ax.get_yticklabels(), ticks):
        label.set_color(color(name))
    ax.set_xlim(0, top * 1.12)
    ax.set_ylim(place - 0.4, -0.8)
    ax.tick_params(left=False)
    ax.grid(axis="x", alpha=0.25)


def draw(panels: Sequence[Drawn], caption: str, path: Path) -> None:
    """Write an SVG of panels side by side.

    Args:
        panels: with values.
        caption: below them.
        path: of the SVG.

    Raises:
        ValueError: if a panel has more series than can be told apart.
    """
    import matplotlib
    from matplotlib.figure import Figure

    for panel in panels:
        if len(panel.series) > MOST_SERIES:
            raise ValueError(
                f"{panel.title} must have at most {MOST_SERIES} series, got {list(panel.series)}"
            )
    rows = [sum(map(len, p.series.values())) + 1.4 * len(set().union(*p.series.values()))
            for p in panels if p.bars]  # fmt: skip
    height = max(2.4, 1.0 + 0.24 * max(rows)) if rows else 3.6
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 * max(2, len(panels)), height), layout="constrained")
        for ax, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            ax.set_title(panel.title, fontsize=12, loc="left")
            if panel.bars:
                draw_bars(ax, panel, named=panel is panels[0] or not panels[0].bars)
            else:
                draw_lines(ax, panel)
        figure.text(0.005, -0.005, caption, fontsize=8, color="#555555", va="top")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
