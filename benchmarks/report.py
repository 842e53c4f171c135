"""Tables and figures of the pages of docs, made of committed rows alone.

Where a page says ``<!-- rows: NAME -->``, what the rows of that benchmark say replaces everything
up to ``<!-- end of rows -->``: a table for each run, newest day first. A run is all rows of a day,
commit and machine; ratios are of one run. ``lightning_length`` has figures too, and the length from
which on ours is faster than the fastest softmax; what runs on several ranks has bars.

Run: python -m benchmarks.report
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.bars import draw_bars
from benchmarks.harness import RESULTS, Row, markdown, parse, read_rows
from benchmarks.lines import draw_lines

PAGE, FIGURES = Path("docs/performance.md"), "figures"
PAGES = (PAGE, *(Path(f"docs/{name}.md") for name in ("ring", "moe", "generation", "long-context")))
PLACE = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
OURS, SOFTMAX = "lasp triton", "softmax"
SWEEPS = ("lightning_length",)  # over lengths: they have figures
LINES = ("generation",)
BARS = ("ring_length", "ring_packed", "moe_overlap")
TIMES = ("forward_ms", "backward_ms")


class Run(NamedTuple):
    """Whose rows may be compared; the fields of a row that say so."""

    benchmark: str
    date: str
    commit: str
    device: str
    num_devices: int
    driver: str
    torch: str
    triton: str
    nccl: str | None

    def __str__(self) -> str:
        devices = f"{self.num_devices} x {self.device}" if self.num_devices > 1 else self.device
        nccl = f", NCCL {self.nccl}" if self.nccl else ""
        return (
            f"{devices}, {self.date}, commit {self.commit[:10]}, driver {self.driver},"
            f" torch {self.torch}, triton {self.triton}{nccl}"
        )


def read_runs(folder: Path) -> dict[Run, list[Row]]:
    """Rows by run, newest day first; of two rows that measure the same in a run, the later."""
    found: dict[Run, dict[str, Row]] = defaultdict(dict)
    for row in read_rows(folder):
        run = Run(*(row[field] for field in Run._fields))
        found[run][json.dumps([row["impl"], row["case"], row["metric"]])] = row
    newest_first = sorted(found, key=lambda run: (run.date, run.commit, str(run)), reverse=True)
    return {run: list(found[run].values()) for run in newest_first}


def number(x: float) -> str:
    """Four digits, never an exponent."""
    if x == 0:
        return "0"
    return f"{x:.{max(0, 3 - math.floor(math.log10(abs(x))))}f}"


def cell(row: Row) -> str:
    """Median, spread, and how many calls if they were few."""
    if row["p20"] is None:
        return number(row["p50"])
    if row["samples"] == 1:
        return f"{number(row['p50'])} (1 call)"
    few = f", {row['samples']} calls" if row["samples"] else ""
    return f"{number(row['p50'])} ({number(row['p20'])} to {number(row['p80'])}{few})"


def table(rows: list[Row]) -> str:
    """What all rows share, one line for each implementation and case, and what bounds are."""
    keys = list(dict.fromkeys(key for row in rows for key in row["case"]))
    values = {key: {json.dumps(row["case"].get(key)) for row in rows} for key in keys}
    varying = [key for key in keys if len(values[key]) > 1]
    shared = [f"{key} = {rows[0]['case'][key]}" for key in keys if key not in varying]
    metrics = {row["metric"]: row["unit"] for row in rows}
    bounds = list(dict.fromkeys(row["bound_name"] for row in rows if row["bound"] is not None))

    lines: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        case = (str(row["case"].get(key, "")) for key in varying)
        lines[(row["impl"], *case)][row["metric"]] = row
    bounded = {row["metric"] for row in rows if row["bound"] is not None}
    head = ["impl", *varying]
    for metric, unit in metrics.items():
        head.append(metric if metric.endswith(unit.lower()) else f"{metric}, {unit}")
        head += ["x bound"] * (metric in bounded)
    body = []
    for name, measured in lines.items():
        cells = list(name)
        for metric in metrics:
            row = measured.get(metric)
            cells.append(cell(row) if row else "")
            if metric in bounded:
                share = row and row["bound"] and f"{row['p50'] / row['bound']:.2f}"
                cells.append(f"{share} [{bounds.index(row['bound_name']) + 1}]" if share else "")
        body.append(cells)
    text = [f"All: {', '.join(shared)}.\n"] if shared else []
    text += markdown(head, body, range(1 + len(varying)))
    notes = [f"[{index}] {name}" for index, name in enumerate(bounds, start=1)]
    return "\n".join(text) + (f"\n\nBounds: {'; '.join(notes)}." if notes else "") + "\n"


class Sweep(NamedTuple):
    """Rows of one run and shape over lengths, and the name of their figure."""

    rows: list[Row]
    figure: str


def sweeps(run: Run, rows: list[Row]) -> list[Sweep]:
    """By heads and head dim."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[f"h{row['case']['heads']}-d{row['case']['head_dim']}"].append(row)
    return [Sweep(some, f"{stem(run)}-{shape}.png") for shape, some in found.items()]


def stem(run: Run) -> str:
    """What the names of its figures begin with."""
    device = run.device.lower().replace(" ", "-")
    return f"{run.benchmark}-{device}-{run.date}-{run.commit[:10]}"


def curve(rows: list[Row], impl: str, metric: str) -> dict[int, float]:
    """Medians by length."""
    found = (row for row in rows if (row["impl"], row["metric"]) == (impl, metric))
    return dict(sorted((row["case"]["tokens"], row["p50"]) for row in found))


def fastest_softmax(rows: list[Row], metric: str) -> dict[int, float]:
    """Length by length."""
    best: dict[int, float] = {}
    for row in rows:
        if SOFTMAX in row["impl"] and row["metric"] == metric:
            tokens = row["case"]["tokens"]
            best[tokens] = min(row["p50"], best.get(tokens, math.inf))
    return best


def crossover(ours: dict[int, float], other: dict[int, float]) -> float | None:
    """Tokens from which on ours takes less time at all lengths that both have.

    Between two lengths, where the lines of the logarithms cross. The shortest length if ours is
    faster at all, None if it is not at the longest.
    """
    lengths = sorted(ours.keys() & other.keys())
    behind = [math.log(ours[n] / other[n]) for n in lengths]
    if not lengths or behind[-1] >= 0:
        return None
    for (a, b), (before, after) in reversed(list(zip(pairwise(lengths), pairwise(behind)))):
        if before >= 0 > after:
            return math.exp(math.log(a) + math.log(b / a) * before / (before - after))
    return float(lengths[0])


def crossovers(rows: list[Row]) -> str:
    """A sentence for forward, and one for backward."""
    lines = []
    for metric in TIMES:
        ours, softmax = curve(rows, OURS, metric), fastest_softmax(rows, metric)
        tokens = crossover(ours, softmax)
        way = metric.removesuffix("_ms").capitalize()
        if tokens is None:
            lines.append(f"{way}: `{OURS}` is not faster than the fastest softmax.")
            continue
        since = "the shortest measured" if tokens == min(ours) else "interpolated"
        longest = max(ours.keys() & softmax.keys())
        ratio = softmax[longest] / ours[longest]
        lines.append(
            f"{way}: `{OURS}` is faster than the fastest softmax from {tokens:.0f} tokens on"
            f" ({since}), {number(ratio)} times at {longest}."
        )
    return "\n".join(lines) + "\n"


def short(tokens: float) -> str:
    """4K, 5.3K, 1M."""
    return f"{tokens / 2**20:.3g}M" if tokens >= 2**20 else f"{tokens / 2**10:.3g}K"


def draw(run: Run, rows: list[Row], path: Path) -> None:
    """Time of forward and backward, and memory, against the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    lengths = sorted({row["case"]["tokens"] for row in rows})
    panels = {
        "forward_ms": "forward, ms",
        "backward_ms": "backward, ms",
        "extra_mib": "memory besides arguments and results, MiB",
    }
    for ax, (metric, title) in zip(figure.subplots(1, 3), panels.items()):
        for impl in dict.fromkeys(row["impl"] for row in rows):
            points = curve(rows, impl, metric)
            ax.plot(points.keys(), points.values(), marker="o", markersize=3, label=impl)
        ax.set_xscale("log", base=2)
        if metric in TIMES:
            ax.set_yscale("log")
        else:  # nothing at all is a good result too
            ax.set_yscale("symlog", linthresh=1)
            ax.set_ylim(bottom=-0.2)
        ax.set_xticks(lengths, [short(n) for n in lengths], fontsize=8)
        tokens = None
        if metric in TIMES:  # memory may be nothing at all
            tokens = crossover(curve(rows, OURS, metric), fastest_softmax(rows, metric))
        if tokens is not None:
            ax.axvline(tokens, color="gray", linestyle=":")
            ax.annotate(
                f" faster than softmax\n from {short(tokens)} tokens on", (tokens, 0.98),
                xycoords=("data", "axes fraction"), va="top", fontsize=8,
            )  # fmt: skip
        ax.set(title=title, xlabel="tokens")
        ax.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    case = rows[0]["case"]
    shape = f"{case['heads']} heads of {case['head_dim']}, {case['dtype']}"
    figure.suptitle(f"{shape}, {run}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def rewrite(page: str, runs: dict[Run, list[Row]]) -> str:
    """The page with every place filled from the rows."""

    def fill(place: re.Match[str]) -> str:
        parts = []
        for run, rows in runs.items():
            if run.benchmark != place[2]:
                continue
            parts.append(f"**{run}**\n")
            for sweep in sweeps(run, rows) if run.benchmark in SWEEPS else ():
                parts.append(f"![time and memory against length]({FIGURES}/{sweep.figure})\n")
                parts.append(crossovers(sweep.rows))
            if run.benchmark in BARS:
                parts.append(f"![times of their bounds]({FIGURES}/{stem(run)}.png)\n")
            if run.benchmark in LINES:
                parts.append(f"![by context and prompt]({FIGURES}/{stem(run)}.png)\n")
            parts.append(table(rows))
        return place[1] + "\n" + ("\n".join(parts) or "No rows yet.\n") + "\n" + place[3]

    return PLACE.sub(fill, page)


@dataclass
class Options:
    """Where the rows are, and the pages, beside which figures go."""

    results: Path = RESULTS
    page: tuple[Path, ...] = PAGES


def main() -> None:
    """Rewrite the pages and draw their figures."""
    options = parse(Options, __doc__)
    runs = read_runs(options.results)
    for page in options.page:
        text = page.read_text()
        page.write_text(rewrite(text, runs))
        places = {place[1] for place in PLACE.findall(text)}
        for run, rows in runs.items():
            for sweep in sweeps(run, rows) if run.benchmark in places.intersection(SWEEPS) else ():
                draw(run, sweep.rows, page.parent / FIGURES / sweep.figure)
            if run.benchmark in places.intersection(BARS):
                draw_bars(str(run), rows, page.parent / FIGURES / f"{stem(run)}.png")
            if run.benchmark in places.intersection(LINES):
                draw_lines(str(run), rows, page.parent / FIGURES / f"{stem(run)}.png")


if __name__ == "__main__":
    main()
