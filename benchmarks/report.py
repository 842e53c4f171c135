"""Tables and figures of the documents, made of committed rows alone.

Every benchmark with rows has a page of tables, ``docs/tables/NAME.md``, one table a run, newest
day first; a run is all rows of a day, commit and machine. Where a page says
``<!-- rows: NAME -->``, this replaces everything up to ``<!-- end of rows -->`` by the benchmark's
figure (``benchmarks.figures``) or, if it has none, by the table of its newest run, and by a link to
all tables.

Run: python -m benchmarks.report
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks import figures, lasp_tables
from benchmarks.drawing import Drawn, draw
from benchmarks.harness import RESULTS, Row, markdown, parse, read_rows
from benchmarks.headlines import headlines
from benchmarks.training_figure import training_note

DOCS = Path("docs")
PLACE = re.compile(r"(<!-- rows: (\w+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
OURS, SOFTMAX = "lasp triton", "softmax"
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
    """Rows by run, newest day and then largest first; of two rows of the same, the later."""
    found: dict[Run, dict[str, Row]] = defaultdict(dict)
    for row in read_rows(folder):
        run = Run(*(row[field] for field in Run._fields))
        found[run][json.dumps([row["impl"], row["case"], row["metric"]])] = row
    order = {run: (run.date, len(rows), str(run)) for run, rows in found.items()}
    newest_first = sorted(found, key=order.__getitem__, reverse=True)
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


def figure(name: str, runs: dict[Run, list[Row]]) -> tuple[list[Drawn], str]:
    """Panels of a benchmark that have rows, each of its newest run, and the runs in words."""
    mine = {run: rows for run, rows in runs.items() if run.benchmark == name}
    panels: list[Drawn] = []
    used: dict[Run, None] = {}
    for panel in figures.FIGURES[name]:
        series, of = panel.chosen(mine)
        if series:
            panels.append(Drawn(panel.title, series, panel.bars, panel.log, panel.axis))
            used |= dict.fromkeys(of)
    rows = [row for run in used for row in mine[run]]
    note = training_note(rows) if name == "hybrid_train" else ""
    return panels, "\n".join(filter(None, [note, *map(str, used)]))


def page_of_tables(name: str, runs: dict[Run, list[Row]]) -> str:
    """All tables of a benchmark, and where they come from."""
    source = (Path(__file__).parent / f"{name}.py").read_text()
    question = (ast.get_docstring(ast.parse(source)) or name).partition("\n\n")[0]
    parts = [
        f"# {name}\n",
        f"{question.replace('``', '`')}\n",
        f"Rows of `benchmarks/{name}.py`, newest run first.",
        "[How to read a table](../performance.md#how-to-read-a-table).\n",
    ]
    if name == "lasp_ranks":
        return "\n".join([*parts, lasp_tables.tables(lasp_tables.read(RESULTS))]) + "\n"
    for run, rows in runs.items():
        if run.benchmark == name:
            parts += [f"## {run}\n", table(rows)]
    return "\n".join(parts)


def rewrite(page: str, runs: dict[Run, list[Row]], docs: str = "") -> str:
    """The page with every place filled from the rows; ``docs`` leads from it to the documents."""

    def fill(place: re.Match[str]) -> str:
        name = place[2]
        if name == "headlines":
            return (
                place[1]
                + "\n"
                + headlines(runs, f"{docs}tables", 4 if docs else None)
                + "\n"
                + place[3]
            )
        newest = next(((run, rows) for run, rows in runs.items() if run.benchmark == name), None)
        if newest is None:
            return place[1] + "\nNo rows yet.\n\n" + place[3]
        parts = []
        if name in figures.FIGURES:
            panels, _ = figure(name, runs)
            titles = "; ".join(panel.title for panel in panels)
            parts.append(f"![{titles}]({docs}figures/{name}.svg)\n")
        else:
            parts += [f"**{newest[0]}**\n", table(newest[1])]
        if name == "lightning_length":
            parts.append(crossovers(newest[1]))
        parts.append(f"[All rows of {name}]({docs}tables/{name}.md).\n")
        return place[1] + "\n" + "\n".join(parts) + "\n" + place[3]

    return PLACE.sub(fill, page)


@dataclass
class Options:
    """Where the rows are, and the documents."""

    results: Path = RESULTS
    docs: Path = DOCS


def pages(docs: Path) -> list[Path]:
    """README and pages that have places for rows."""
    found = [*docs.parent.glob("README.md"), *sorted(docs.glob("*.md"))]
    return [path for path in found if PLACE.search(path.read_text())]


def leading(page: Path, docs: Path) -> str:
    """What leads from a page to the documents."""
    return "" if page.parent == docs else f"{docs.name}/"


def main() -> None:
    """Rewrite the pages, the tables and the figures."""
    options = parse(Options, __doc__)
    runs = read_runs(options.results)
    for page in pages(options.docs):
        page.write_text(rewrite(page.read_text(), runs, leading(page, options.docs)))
    (options.docs / "tables").mkdir(exist_ok=True)
    for name in dict.fromkeys(run.benchmark for run in runs):
        (options.docs / f"tables/{name}.md").write_text(page_of_tables(name, runs))
        if name in figures.FIGURES:
            panels, caption = figure(name, runs)
            draw(panels, caption, options.docs / f"figures/{name}.svg")


if __name__ == "__main__":
    main()
