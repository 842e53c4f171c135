"""The tables of docs/lasp.md, made of committed rows alone.

Prints Markdown, or puts it between the two marks of a page: times of forward and backward as
multiples of the same rank's local kernels, bytes that a rank receives, how far ``auto`` is from the
best single strategy, and the exchange alone.

Run: python -m benchmarks.lasp_tables --write docs/lasp.md
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
SINGLE = ("all_gather", "sliced", "scan", "one_hop")


class Key(NamedTuple):
    """One case on one machine."""

    device: str
    ranks: int
    heads: int
    tokens: int
    layer_index: int
    documents: int
    order: str
    commit: str

    def __str__(self) -> str:
        return (
            f"H = {self.heads}, T = {self.tokens}, layer {self.layer_index},"
            f" {self.documents} document{'s' * (self.documents > 1)}"
            + f", {self.order}"
            * (self.order != "contiguous")
        )


Cases = dict[Key, dict[str, dict[str, dict[str, Any]]]]


def read(paths: Sequence[Path]) -> Cases:
    """Rows of ``lasp_ranks`` on GPUs by case, implementation and metric."""
    cases: Cases = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        for line in path.read_text().splitlines():
            row = json.loads(line)
            if row["benchmark"] == "lasp_ranks" and row["nccl"]:
                case = row["case"]
                facts = (case[name] for name in Key._fields[1:-1])
                key = Key(row["device"], *facts, row["commit"])
                cases[key][row["impl"]][row["metric"]] = row
    return cases


def times(cases: Cases, metric: str) -> Iterator[str]:
    """Milliseconds of local, and of each implementation as a multiple of it."""
    impls = list(dict.fromkeys(impl for case in cases.values() for impl in case))
    others = [impl for impl in impls if impl != "local"]
    yield "| case | local ms | " + " | ".join(others) + " |"
    yield "| --- |" + " ---: |" * (len(others) + 1)
    for key, case in cases.items():
        bound = case["local"][metric]["p50"]
        shares = [
            f"{case[impl][metric]['p50'] / bound:.2f}" if metric in case.get(impl, {}) else ""
            for impl in others
        ]
        yield f"| {key} | {bound:.3f} | " + " | ".join(shares) + " |"


def volumes(cases: Cases) -> Iterator[str]:
    """Megabytes that a rank receives, forward, by heads: the first case of each."""
    first: dict[int, Key] = {}
    for key in cases:
        if key.documents == 1:
            first.setdefault(key.heads, key)
    for heads, key in first.items():
        yield f"| H = {heads}, T = {key.tokens} | MB forward | MB backward |"
        yield "| --- | ---: | ---: |"
        for impl, metrics in cases[key].items():
            if "forward_bytes" in metrics and impl != "local":
                there, back = (metrics[f"{way}_bytes"]["p50"] for way in ("forward", "backward"))
                yield f"| {impl} | {there / 1e6:.2f} | {back / 1e6:.2f} |"
        yield ""


def auto(cases: Cases) -> Iterator[str]:
    """Forward and backward together under auto, and under the best single strategy."""
    yield "| case | auto is | auto ms | best single | ms | auto / best |"
    yield "| --- | --- | ---: | --- | ---: | ---: |"
    for key, case in cases.items():
        total = {
            impl: sum(case[impl][metric]["p50"] for metric in ("forward_ms", "backward_ms"))
            for impl in (*SINGLE, "auto")
            if "backward_ms" in case.get(impl, {})
        }
        if "auto" not in total or len(total) < 2:
            continue
        best = min((impl for impl in total if impl != "auto"), key=lambda impl: total[impl])
        strategies = case["auto"]["forward_ms"]["case"]["strategies"]
        what = " + ".join(f"{name} ({heads})" for name, heads, _ in strategies) or "nothing sent"
        yield (
            f"| {key} | {what} | {total['auto']:.3f} | {best} | {total[best]:.3f} |"
            f" {total['auto'] / total[best]:.3f} |"
        )


def exchanges(cases: Cases) -> Iterator[str]:
    """Microseconds of the exchange alone."""
    impls = (*SINGLE, "auto", "serial")  # serial: LASP's chain, in rows of earlier versions
    yield "| case | " + " | ".join(impls) + " |"
    yield "| --- |" + " ---: |" * len(impls)
    for key, case in cases.items():
        values = [
            f"{1e3 * case[impl]['exchange_ms']['p50']:.0f}"
            if "exchange_ms" in case.get(impl, {})
            else ""
            for impl in impls
        ]
        yield f"| {key} | " + " | ".join(values) + " |"


def tables(cases: Cases) -> str:
    """All of it, run by run."""
    lines = []
    runs = dict.fromkeys((key.device, key.ranks, key.commit) for key in cases)
    for device, ranks, commit in runs:
        some: Cases = {
            key: case
            for key, case in cases.items()
            if (key.device, key.ranks, key.commit) == (device, ranks, commit) and "local" in case
        }
        row = next(iter(some.values()))["local"]["forward_ms"]
        lines += [
            f"### {ranks} x {device}",
            "",
            f"torch {row['torch']}, triton {row['triton']}, NCCL {row['nccl']}, driver"
            f" {row['driver']}, {row['date']}, commit {commit[:10]}, medians of {row['samples']}"
            " samples, each of the slowest rank.",
            "",
        ]
        for title, made in (
            ("Forward, as a multiple of local:", times(some, "forward_ms")),
            ("Backward, as a multiple of local:", times(some, "backward_ms")),
            ("`auto` against the best single strategy, forward and backward:", auto(some)),
            ("The exchange alone, us:", exchanges(some)),
            ("Bytes counted at the collectives:", volumes(some)),
        ):
            lines += [title, "", *made, ""]
    return "\n".join(lines).strip() or "No rows yet."


def main() -> None:
    """Print or write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    text = tables(read(sorted(options.results.glob("*.jsonl"))))
    if options.write is None:
        print(text)
        return
    page = options.write.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
