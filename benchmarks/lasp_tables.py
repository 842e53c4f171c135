"""The tables of ``lasp_ranks``, of which ``benchmarks.report`` makes docs/tables/lasp_ranks.md.

Times of forward and backward as multiples of the same rank's local kernels, bytes that a rank
receives, how far ``auto`` is from the best single strategy, and the exchange alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import Row, markdown, read_rows

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


Cases = dict[Key, dict[str, dict[str, Row]]]


def read(folder: Path) -> Cases:
    """Rows of ``lasp_ranks`` on GPUs by case, implementation and metric."""
    cases: Cases = defaultdict(lambda: defaultdict(dict))
    for row in read_rows(folder):
        if row["benchmark"] == "lasp_ranks" and row["nccl"]:
            facts = (row["case"][name] for name in Key._fields[1:-1])
            key = Key(row["device"], *facts, row["commit"])
            cases[key][row["impl"]][row["metric"]] = row
    return cases


def p50(case: dict[str, dict[str, Row]], impl: str, metric: str, form: str, unit: float) -> str:
    """A median in units; nothing where it was not measured."""
    row = case.get(impl, {}).get(metric)
    return format(row["p50"] / unit, form) if row else ""


def times(cases: Cases, metric: str) -> list[str]:
    """Milliseconds of local, and of each implementation as a multiple of it."""
    others = dict.fromkeys(impl for case in cases.values() for impl in case if impl != "local")
    body = []
    for key, case in cases.items():
        bound = case["local"][metric]["p50"]
        shares = [p50(case, impl, metric, ".2f", bound) for impl in others]
        body.append([str(key), f"{bound:.3f}", *shares])
    return markdown(["case", "local ms", *others], body, [0])


def volumes(cases: Cases) -> Iterator[str]:
    """Megabytes that a rank receives by heads: the first case of each."""
    first: dict[int, Key] = {}
    for key in cases:
        if key.documents == 1:
            first.setdefault(key.heads, key)
    for heads, key in first.items():
        sizes = ("forward_bytes", "backward_bytes")
        body = [
            [impl, *(p50(cases[key], impl, size, ".2f", 1e6) for size in sizes)]
            for impl, metrics in cases[key].items()
            if "forward_bytes" in metrics and impl != "local"
        ]
        yield from markdown(
            [f"H = {heads}, T = {key.tokens}", "MB forward", "MB backward"], body, [0]
        )
        yield ""


def auto(cases: Cases) -> list[str]:
    """Forward and backward together under auto, and under the best single strategy."""
    body = []
    for key, case in cases.items():
        total = {
            impl: sum(case[impl][metric]["p50"] for metric in ("forward_ms", "backward_ms"))
            for impl in (*SINGLE, "auto")
            if "backward_ms" in case.get(impl, {})
        }
        if "auto" not in total or len(total) < 2:
            continue
        own = total.pop("auto")
        best = min(total, key=lambda impl: total[impl])
        strategies = case["auto"]["forward_ms"]["case"]["strategies"]
        what = " + ".join(f"{name} ({heads})" for name, heads, _ in strategies) or "nothing sent"
        numbers = (f"{total[best]:.3f}", f"{own / total[best]:.3f}")
        body.append([str(key), what, f"{own:.3f}", best, *numbers])
    head = ["case", "auto is", "auto ms", "best single", "ms", "auto / best"]
    return markdown(head, body, [0, 1, 3])


def exchanges(cases: Cases) -> list[str]:
    """Microseconds of the exchange alone."""
    impls = (*SINGLE, "auto", "serial")  # serial: LASP's chain, in rows of earlier versions
    body = [
        [str(key), *(p50(case, impl, "exchange_ms", ".0f", 1e-3) for impl in impls)]
        for key, case in cases.items()
    ]
    return markdown(["case", *impls], body, [0])


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
