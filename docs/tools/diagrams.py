"""The drawings of docs/concepts: python docs/tools/diagrams.py writes docs/figures/*.svg.

Where something is computed, a layout computes it: runs of ranks and needed keys are those that the
library has for the pack that is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lasp import SequenceLayout

FIGURES = Path(__file__).parents[1] / "figures"
RANKS = ("#4269d0", "#efb118", "#3ca951", "#ff725c")
DOCUMENTS = ("#d9d9d9", "#8c8c8c", "#bdbdbd")
SUBSCRIPTS = "₀₁₂₃"
INK, PALE = "#222222", "#f2f2f2"
LENGTHS, NUM_RANKS = (11, 1, 20), 4
DRAWN = (
    1024  # tokens that the drawing of orders shows as one: work of documents as long as in training
)


class Drawing:
    """Shapes of one SVG; coordinates in pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.shapes = (width, height), title, []

    def box(self, x: float, y: float, w: float, h: float, fill: str, text: str = "") -> None:
        """A rectangle, with a text in its middle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"'
            ' stroke="white" stroke-width="1.5" rx="3"/>'
        )
        if text:
            dark = fill in (*RANKS[:1], DOCUMENTS[1], RANKS[2])
            self.text(x + w / 2, y + h / 2 + 4.5, text, "middle", "white" if dark else INK)

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", fill: str = INK, size: int = 13
    ) -> None:
        """A line of text; ``y`` is its base."""
        self.shapes.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}"'
            f' font-size="{size}">{text}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, color: str = INK) -> None:
        """An arrow from the first point to the second."""
        self.shapes.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{color}"'
            ' stroke-width="1.8" marker-end="url(#head)"/>'
        )

    def svg(self) -> str:
        """The file."""
        width, height = self.size
        head = (
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            f' orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker>'
        )
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
            f' width="{width}" height="{height}" font-family="system-ui, sans-serif">',
            f"<title>{self.title}</title><defs>{head}</defs>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *self.shapes,
            "</svg>\n",
        ])  # fmt: skip


def layout() -> Drawing:
    """One pack of three documents, and which rank holds which tokens in three orders."""
    drawing = Drawing(720, 262, "A pack of three documents and who holds its tokens, by order")
    left, token, high = 122, 18, 34
    drawing.text(8, 46, "pack")
    borders = (0, *accumulate(LENGTHS))
    for name, (start, stop), fill in zip("ABC", pairwise(borders), DOCUMENTS):
        width = (stop - start) * token
        drawing.box(left + start * token, 24, width, high, fill, name)
    shares: list[str] = []
    for row, order in enumerate(("contiguous", "zigzag", "fold")):
        y = 84 + row * 46
        drawing.text(8, y + 22, order)
        layout = SequenceLayout(tuple(DRAWN * n for n in LENGTHS), NUM_RANKS, order)
        for rank in range(NUM_RANKS):
            for run in layout.runs(rank):
                start, stop = run.start / DRAWN * token, run.stop / DRAWN * token
                drawing.box(left + start, y, stop - start, high, RANKS[rank], str(rank))
        work = [layout.work(rank) for rank in range(NUM_RANKS)]
        shares.append(f"{order} {NUM_RANKS * max(work) / sum(work):.2f}")
    drawing.text(8, 238, "Numbers are ranks; a stretch without a gap is a run.")
    drawing.text(
        8, 255, f"Attention work of the busiest rank, times the mean: {', '.join(shares)}."
    )
    return drawing


def states() -> Drawing:
    """What each rank computes and sends in lightning attention."""
    drawing = Drawing(720, 300, "States of lightning attention that cross ranks")
    for rank in range(NUM_RANKS):
        x = 12 + rank * 176
        drawing.box(x, 16, 160, 34, RANKS[rank], f"tokens of rank {rank}")
        drawing.arrow(x + 80, 50, x + 80, 82)
        drawing.box(x, 84, 160, 34, PALE, f"U{SUBSCRIPTS[rank]} = Σ decayed kᵀv")
        if rank + 1 < NUM_RANKS:
            drawing.arrow(x + 80, 118, x + 80, 150)
        if rank:
            drawing.arrow(x + 80, 186, x + 80, 216)
            terms = (
                "".join(f"M{SUBSCRIPTS[m]}" for m in range(rank - 1, r, -1)) + f"U{SUBSCRIPTS[r]}"
                for r in range(rank)
            )
            drawing.box(x, 218, 160, 34, PALE, "S = " + " + ".join(terms))
    drawing.box(
        12, 152, 688, 34, "#cfd8f5", "exchange of states: K x V numbers a head, whatever the length"
    )
    drawing.text(
        12,
        276,
        "While states travel, each rank attends within its own tokens; what came before",
    )
    drawing.text(
        12, 293, "them enters as q S. M is the decay over a run, 0 where a document ends in it."
    )
    return drawing


def needed(order: str = "contiguous") -> Iterator[tuple[int, int, int, int]]:
    """Blocks (row rank, key rank, first key, stop) of keys that a rank needs from others."""
    layout = SequenceLayout(LENGTHS, NUM_RANKS, order)
    borders = (0, *accumulate(LENGTHS))
    for rows in range(NUM_RANKS):
        (run,) = layout.runs(rows)
        begin = max(border for border in borders if border <= run.start)
        for keys in range(rows):
            (other,) = layout.runs(keys)
            start = max(begin, other.start)
            if start < other.stop:
                yield rows, keys, start, other.stop


def ring() -> Drawing:
    """The scores that each rank computes, and the keys that have to move for them."""
    drawing = Drawing(720, 420, "Scores of a causal pack over four ranks")
    left, top, token = 96, 44, 11
    size = token * sum(LENGTHS)
    borders = (0, *accumulate(LENGTHS))
    layout = SequenceLayout(LENGTHS, NUM_RANKS, "contiguous")
    drawing.box(left, top, size, size, PALE)
    for rows, keys, start, stop in needed():
        (run,) = layout.runs(rows)
        end = min(run.stop, min(b for b in borders if b > run.start))
        drawing.box(
            left + start * token, top + run.start * token, (stop - start) * token,
            (end - run.start) * token, RANKS[keys], f"from {keys}",
        )  # fmt: skip
    for rank in range(NUM_RANKS):
        (run,) = layout.runs(rank)
        drawing.text(left - 8, top + (run.start + run.stop) / 2 * token + 5, f"rank {rank}", "end")
        cuts = [run.start, *(b for b in borders if run.start < b < run.stop), run.stop]
        for a, b in pairwise(cuts):
            corners = ((a, a), (b, b), (a, b))
            points = " ".join(f"{left + x * token:g},{top + y * token:g}" for x, y in corners)
            drawing.shapes.append(
                f'<polygon points="{points}" fill="{RANKS[rank]}" fill-opacity="0.45"'
                ' stroke="white" stroke-width="1.5"/>'
            )
    for name, (a, b) in zip("ABC", pairwise(borders)):
        drawing.text(left + (a + b) / 2 * token, top - 8, name, "middle")
    drawing.text(left, top - 24, "keys of documents")
    x = left + size + 22
    for line, y in (
        ("Triangles: a rank's own keys,", 80), ("one varlen call.", 97),
        ("Rectangles: keys of the same", 130), ("document that other ranks hold.", 147),
        ("They move; colours say whose.", 164), ("Rectangles need no mask.", 181),
        ("Grey: nothing is computed", 214), ("and nothing moves.", 231),
    ):  # fmt: skip
        drawing.text(x, y, line)
    return drawing


def experts() -> Drawing:
    """Groups of experts in a pipeline: rows there, products, results back."""
    drawing = Drawing(720, 232, "Communication of a group of experts under the products of another")
    left, unit, high = 118, 92, 36
    for row, name in enumerate(("rows there", "products", "results back")):
        drawing.text(8, 40 + row * 52, name)
    for group in range(4):
        for row, shift in enumerate((0, 1, 2)):
            x = left + (group + shift) * unit
            drawing.box(x, 18 + row * 52, unit - 4, high, RANKS[group], f"group {group}")
    drawing.arrow(left, 176, left + 6 * unit, 176)
    drawing.text(left + 6 * unit - 4, 194, "time", "end")
    drawing.text(
        8,
        212,
        "A rank's experts are cut into groups. Only the first rows there and the last",
    )
    drawing.text(
        8, 228, "results back have no products beside them; these groups are half as large."
    )
    return drawing


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "concept-layout.svg": layout,
    "concept-states.svg": states,
    "concept-ring.svg": ring,
    "concept-experts.svg": experts,
}


def main() -> None:
    """Write every drawing."""
    for name, draw in DRAWINGS.items():
        (FIGURES / name).write_text(draw().svg())


if __name__ == "__main__":
    main()
