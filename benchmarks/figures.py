"""What the figures of the documents show; ``benchmarks.drawing`` is how.

A figure is a row of panels. Each takes the newest run that has rows for it, so that what stands in
one panel was measured side by side; the caption names the runs. ``benchmarks.report`` draws
``docs/figures/NAME.svg`` for every benchmark that is listed in ``FIGURES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks.drawing import Series, short
from benchmarks.harness import Row
from benchmarks.training_figure import trained


class Panel(NamedTuple):
    """One panel.

    Attributes:
        title: with the unit.
        series: values of every implementation in the rows of a run, maybe none.
        bars: by case; else lines over a number.
        log: whether the values have a logarithmic axis.
        axis: what lines go over.
    """

    title: str
    series: Callable[[list[Row]], Series]
    bars: bool = False
    log: bool = True
    axis: str = "tokens"

    def chosen(self, runs: Mapping[Any, list[Row]]) -> tuple[Series, list[Any]]:
        """The values, and the runs that they are of.

        Lines: the run that has most implementations, then most points, the newest of these. Bars:
        the newest run of each device. Runs of one day, commit and device, on one and on more GPUs,
        are one.
        """
        series: dict[str, dict[Any, float]] = {}
        used: list[Any] = []
        devices: dict[str, tuple[str, str]] = {}
        measured = [(run, found) for run, rows in runs.items() if (found := self.series(rows))]
        if not self.bars:  # sorting is stable: newest first among equals
            measured.sort(key=lambda pair: (-len(pair[1]), -sum(map(len, pair[1].values()))))
        for run, found in measured:
            when = (run.date, run.commit)
            if devices.setdefault(run.device, when) != when:
                continue
            if used and not self.bars and run.device != used[0].device:
                continue
            used.append(run)
            device = run.device.removeprefix("NVIDIA ").split()[0]
            for name, values in found.items():
                named = {f"{device}: {x}": y for x, y in values.items()} if self.bars else values
                series[name] = {**named, **series.get(name, {})}
        return {n: dict(sorted(v.items())) if not self.bars else v for n, v in series.items()}, used


def by(
    axis: str,
    metric: str,
    name: Callable[[Row], str | None] = lambda row: str(row["impl"]),
    **case: Any,
) -> Callable[[list[Row]], Series]:
    """Medians of a metric over a field of the case; ``name`` drops rows for which it is None."""

    def series(rows: list[Row]) -> Series:
        found: dict[str, dict[Any, float]] = {}
        for row in rows:
            fields = row["case"]
            if row["metric"] != metric or fields.get(axis) is None:
                continue
            if any(fields.get(key) != value for key, value in case.items()):
                continue
            if (label := name(row)) is not None:
                found.setdefault(label, {})[fields[axis]] = row["p50"]
        return {label: dict(sorted(points.items())) for label, points in found.items()}

    return series


def share_of_bound(
    metric: str, case: Callable[[Row], str | None], name: Callable[[Row], str | None]
) -> Callable[[list[Row]], Series]:
    """Bounds over medians in percent, by case."""

    def series(rows: list[Row]) -> Series:
        found: dict[str, dict[Any, float]] = {}
        for row in rows:
            if row["metric"] == metric and row["bound"]:
                label, where = name(row), case(row)
                if label is not None and where is not None:
                    found.setdefault(label, {})[where] = 100 * row["bound"] / row["p50"]
        return found

    return series


def moe_name(row: Row) -> str | None:
    """Few of the many rows: ours by its rule, by NCCL and by copies, and the peers."""
    names = {
        "lasp, by the rule, copied": "ours, copy engines",
        "lasp, by the rule": "ours, NCCL",
        "lasp, groups by the rule, copied": "ours, copy engines",  # as older rows have it
        "lasp, groups by the rule": "ours, NCCL",
        "lasp 1 groups": "ours, one group, NCCL",
        "2 token groups": "two token groups",
    }
    impl = str(row["impl"])
    return "Megatron-Core" if impl.startswith("Megatron") else names.get(impl)


def moe_case(row: Row) -> str | None:
    """The shape of experts and the split."""
    case = row["case"]
    if case["max_ctas"] or case["ep"] * case["etp"] == 1:
        return None
    split = f"EP {case['ep']}" if case["ep"] > 1 else f"ETP {case['etp']}"
    shape = f"{case['experts']} experts of {case['hidden']} x {case['ffn']}"
    return f"{shape}, {short(case['tokens'])} tokens, {split}"


def ring_case(row: Row) -> str | None:
    """Length or documents of a ring benchmark."""
    case = row["case"]
    if case["documents"] == "one":
        return f"{short(case['tokens'])} tokens a GPU{', causal' * case['causal']}"
    return f"pack {case['documents']}" if row["impl"] != "ring" or case["planned"] else None


def exchanged(row: Row) -> str | None:
    """LASP+ by the rule beside its peers."""
    case = row["case"]
    wanted = (case["heads"], case["layer_index"], case["documents"]) == (64, 0, 1)
    names = {"auto": "LASP+, auto", "local": "no exchange"}
    impl = str(row["impl"])
    return names.get(impl, impl) if wanted and impl in EXCHANGED else None


def ratio(row: Row) -> str | None:
    """Sums of layers by how many are lightning."""
    found: str | None = row["case"].get("ratio")
    return found


def one_layer(row: Row) -> str | None:
    """Rows of single layers."""
    return None if "ratio" in row["case"] or "batch" in row["case"] else str(row["impl"])


def prompts(rows: list[Row]) -> Series:
    """Seconds of a prefill by ratio of layers."""
    series = by("prompt", "prefill_ms", ratio)(rows)
    return {
        name: {f"{short(x)} tokens": y / 1000 for x, y in values.items()}
        for name, values in series.items()
    }


def layer_kind(row: Row) -> str:
    """Lightning or softmax."""
    return f"{row['case']['layer']} layer"


def recalled(row: Row) -> str | None:
    """The pattern."""
    names = {"softmax": "all softmax", "lightning": "all lightning"}
    pattern = str(row["case"]["pattern"])
    return names.get(pattern, pattern)


def kernel_case(row: Row) -> str | None:
    """The heads and tokens of a kernel, of one document and few layers."""
    case = row["case"]
    layer = 0 if case["head_dim"] == 128 else 40
    if (case["documents"], case["layer_index"]) != (1, layer):
        return None
    return f"{case['heads']} heads of {case['head_dim']}, {short(case['tokens'])} tokens"


EXCHANGED = ("auto", "local", "LASP", "LASP-2", "head parallel")
RING = {
    f"{title}, % of one GPU": share_of_bound(metric, ring_case, lambda row: str(row["impl"]))
    for metric, title in (("forward_ms", "forward"), ("both_ms", "both directions"))
}
CONTEXT = "tokens of context"
FIGURES: dict[str, tuple[Panel, ...]] = {
    "hybrid_train": (
        Panel("tokens/s a GPU", trained("tokens_per_s"), axis=CONTEXT),
        Panel("peak memory, GB a GPU", trained("peak_memory"), log=False, axis=CONTEXT),
    ),
    "kept_activations": (
        Panel("kept, bytes a token", by("policy", "kept", layer_kind), bars=True, log=False),
        Panel("both ways, ms", by("policy", "both_ms", layer_kind), bars=True, log=False),
    ),
    "needle": (
        Panel("recalled, median of three seeds", by("pairs", "accuracy", recalled, seed="all"),
              log=False, axis="pairs in 1,024 tokens"),
        Panel("recalled, one seed", by("pairs", "accuracy", recalled, length=4096, seed=2),
              log=False, axis="pairs in 4,096 tokens"),
    ),
    "moe_against_tp": (
        Panel("forward and backward, ms", by("tokens", "both_ms"), axis="tokens a GPU"),
        Panel("x plain tensor parallelism", by("tokens", "x_plain"), log=False,
              axis="tokens a GPU"),
    ),
    "lightning_length": (
        Panel("forward, ms", by("tokens", "forward_ms")),
        Panel("backward, ms", by("tokens", "backward_ms")),
        Panel("memory besides tensors, MiB", by("tokens", "extra_mib"), log=False),
    ),
    "generation": (
        Panel("next token of a layer, ms", by("context", "step_ms", one_layer), axis=CONTEXT),
        Panel("next token of 16 layers, ms", by("context", "step_ms", ratio), axis=CONTEXT),
        Panel("prefill of 8 layers, s", prompts, bars=True, log=False),
    ),
    "ring_length": tuple(Panel(t, s, bars=True, log=False) for t, s in RING.items()),
    "ring_packed": tuple(Panel(t, s, bars=True, log=False) for t, s in RING.items()),
    "moe_overlap": tuple(
        Panel(f"{title}, % of bare products", share_of_bound(metric, moe_case, moe_name),
              bars=True, log=False)
        for metric, title in (("forward_ms", "forward"), ("both_ms", "both directions"))
    ),
    "lightning_kernels": tuple(
        Panel(
            f"{title}, % of copy bandwidth",
            share_of_bound(metric, kernel_case, lambda row: row["impl"]), bars=True, log=False,
        )
        for metric, title in (("forward_graph_ms", "forward"), ("both_graph_ms", "both ways"))
    ),
    "lightning_decode": (
        Panel("next token of a batch, 64 heads, ms",
              by("batch", "step_ms", heads=64, tokens=1), axis="sequences"),
    ),
    "lasp_ranks": tuple(
        Panel(f"{way} over 2 GPUs, ms", by("tokens", f"{way}_ms", exchanged), axis="tokens a GPU")
        for way in ("forward", "backward")
    ),
}  # fmt: skip
