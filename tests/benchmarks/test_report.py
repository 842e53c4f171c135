from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks import drawing, report
from benchmarks.headlines import HEADLINES

ROOT = Path(__file__).parents[2]


def make_row(impl="lasp triton", tokens=4096, metric="forward_ms", p50=1.0, **fields):
    row = {
        "benchmark": "lightning_length", "impl": impl,
        "case": {"tokens": tokens, "heads": 16, "head_dim": 128, "dtype": "bfloat16"},
        "metric": metric, "p20": p50, "p50": p50, "p80": p50, "unit": "ms",
        "bound": None, "bound_name": None, "samples": None, "command": "c", "commit": "a" * 40,
        "date": "2026-01-02", "device": "GPU X", "num_devices": 1, "driver": "1", "torch": "2",
        "triton": "3", "nccl": None,
    }  # fmt: skip
    return row | fields


def sweep_rows():
    """Ours linear, softmax quadratic: forward crosses at 8192 tokens, backward at 2 * 8192."""
    for tokens in (4096, 12000, 65536):
        for factor, metric in ((1, "forward_ms"), (2, "backward_ms")):
            yield make_row(tokens=tokens, metric=metric, p50=tokens / 8192 * factor)
            slow = (tokens / 8192) ** 2
            for name, times in (("math", 4), ("cudnn", 1), ("flash 2", 3)):
                yield make_row(f"torch softmax {name}", tokens, metric, p50=slow * times)
        yield make_row(tokens=tokens, metric="extra_mib", p50=0.0, p20=None, unit="MiB")


def write(folder: Path, *files) -> Path:
    for index, rows in enumerate(files):
        (folder / f"{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


PAGES = report.pages(ROOT / report.DOCS)
RUNS = report.read_runs(ROOT / report.RESULTS)
STALE = "run python -m benchmarks.report"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_committed_rows_say(path) -> None:
    page = path.read_text()
    assert page == report.rewrite(page, RUNS, report.leading(path, ROOT / report.DOCS)), STALE
    names = [name for _, name, _ in report.PLACE.findall(page)]
    assert len(names) == len(set(names)) == page.count("<!-- rows: ") == page.count("<!-- end of")


def test_tables_are_what_the_committed_rows_say() -> None:
    tables = {path.stem: path.read_text() for path in (ROOT / "docs/tables").glob("*.md")}
    assert tables.keys() == {run.benchmark for run in RUNS}, STALE
    for name, text in tables.items():
        assert text == report.page_of_tables(name, RUNS), STALE


MEASURED = {run.benchmark for run in RUNS}


@pytest.mark.parametrize("name", [name for name in report.figures.FIGURES if name in MEASURED])
def test_figures_are_what_the_committed_rows_say(name, tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs the extra bench")
    panels, caption = report.figure(name, RUNS)
    report.draw(panels, caption, tmp_path / "figure.svg")
    drawn, committed = tmp_path / "figure.svg", ROOT / f"docs/figures/{name}.svg"
    assert len(panels) == len(report.figures.FIGURES[name])
    if f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text():
        assert drawn.read_bytes() == committed.read_bytes(), STALE


CASES = {
    "kept_activations": ({"layer": "softmax", "policy": "full"},),
    "needle": tuple(
        {"pattern": pattern, "seed": seed, "pairs": pairs, "length": 4096}
        for pattern in ("softmax", "7:1") for seed in (2, "all") for pairs in (1, 8)
    ),
    "moe_against_tp": ({"tokens": 8192}, {"tokens": 32768}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "metrics", "series"),
    [
        ("kept_activations", ("kept", "both_ms"), {"softmax layer"}),
        ("needle", ("accuracy",), {"all softmax", "7:1"}),
        ("moe_against_tp", ("both_ms", "x_plain"), {"lasp"}),
    ],
)
def test_figures_wait_for_rows(tmp_path, name, metrics, series) -> None:
    made = [
        make_row(benchmark=name, impl="lasp", case=case, metric=metric, p50=0.5)
        for case in CASES[name]
        for metric in metrics
    ]
    panels, _ = report.figure(name, report.read_runs(write(tmp_path, made)))
    assert len(panels) == len(report.figures.FIGURES[name])
    assert all(set(panel.series) == series for panel in panels)


def test_headlines_have_rows_and_their_runs_are_not_mixed() -> None:
    lines = report.headlines(RUNS, "tables").splitlines()[2:]
    assert len(lines) == len(HEADLINES)
    for line in lines:
        (page,) = re.findall(r"\]\(tables/(\w+)\.md\)", line)
        assert (ROOT / f"docs/tables/{page}.md").exists()


def test_implementations_have_one_color_and_few_share_a_panel() -> None:
    for name in report.figures.FIGURES:
        for panel in report.figure(name, RUNS)[0]:
            colors = [drawing.color(impl) for impl in panel.series]
            assert len(colors) == len(set(colors)) <= drawing.MOST_SERIES, (name, panel.title)


def test_a_later_run_of_fewer_points_is_not_drawn(tmp_path) -> None:
    part = [make_row(tokens=4096, p50=9.0, commit="b" * 40, date="2026-01-03")]
    whole = [row for row in sweep_rows() if row["impl"] == "lasp triton"]
    runs = report.read_runs(write(tmp_path, whole, part))
    series, _ = report.figures.Panel("ms", report.figures.by("tokens", "forward_ms")).chosen(runs)
    assert series["lasp triton"][4096] != 9.0


def test_too_many_series_are_refused(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra bench")
    series = {f"impl {i}": {1: 1.0} for i in range(drawing.MOST_SERIES + 1)}
    panel = drawing.Drawn("ms", series, bars=False, log=True, axis="tokens")
    with pytest.raises(ValueError, match="at most 6 series"):
        drawing.draw([panel], "", tmp_path / "figure.svg")


def test_labels_are_moved_apart_in_their_order() -> None:
    assert drawing.spread([0.5, 0.5, 0.0], 0.1) == pytest.approx([0.45, 0.55, 0.0])


def test_rewrite_fills_places_and_nothing_else(tmp_path) -> None:
    runs = report.read_runs(write(tmp_path, [make_row(benchmark="one", p50=1.25)]))
    one, two = (f"<!-- rows: {name} -->\nold\n<!-- end of rows -->\n" for name in ("one", "two"))
    page = f"a\n{one}b\n{two}"
    filled = report.rewrite(page, runs)
    assert filled.startswith("a\n<!-- rows: one -->\n")
    assert "[All rows of one](tables/one.md)" in filled
    assert "old" not in filled
    assert "| lasp triton | 1.250 (1.250 to 1.250) |" in filled
    assert "b\n<!-- rows: two -->\n\nNo rows yet.\n\n<!-- end of rows -->\n" in filled
    assert report.rewrite(filled, runs) == filled


def test_runs_are_not_mixed_and_a_later_row_replaces_an_earlier(tmp_path) -> None:
    rows = [
        [make_row(p50=1.0), make_row(p50=2.0), make_row(tokens=1, p50=3.0)],
        [make_row(p50=4.0, commit="b"), make_row(p50=5.0, date="2026-01-03")],
    ]
    runs = report.read_runs(write(tmp_path, *rows))
    assert [(run.date, run.commit[0]) for run in runs] == [
        ("2026-01-03", "a"), ("2026-01-02", "a"), ("2026-01-02", "b"),
    ]  # fmt: skip
    assert [[row["p50"] for row in rows] for rows in runs.values()] == [[5.0], [2.0, 3.0], [4.0]]


def test_table() -> None:
    bound = {"bound": 0.5, "bound_name": "4 tensors"}
    rows = [
        make_row(p50=1.0, p20=0.9, p80=1.1, **bound),
        make_row(metric="extra_mib", p50=0.0, p20=None, p80=None, unit="MiB", samples=1),
        make_row(impl="other", p50=1234.5678, samples=3, bound=100, bound_name="products"),
        make_row(impl="other", tokens=8192, p50=0.00123456, samples=1),
    ]
    assert report.table(rows) == (
        "All: heads = 16, head_dim = 128, dtype = bfloat16.\n"
        "\n"
        "| impl | tokens | forward_ms | x bound | extra_mib |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| lasp triton | 4096 | 1.000 (0.9000 to 1.100) | 2.00 [1] | 0 |\n"
        "| other | 4096 | 1235 (1235 to 1235, 3 calls) | 12.35 [2] |  |\n"
        "| other | 8192 | 0.001235 (1 call) |  |  |\n"
        "\n"
        "Bounds: [1] 4 tensors; [2] products.\n"
    )


@pytest.mark.parametrize(
    ("ours", "other", "expected"),
    [
        ({1: 10, 100: 1000}, {1: 1, 100: 10000}, 10),  # lines in logarithms: exact
        ({1: 2, 2: 1, 4: 9, 8: 1}, {1: 1, 2: 2, 4: 1, 8: 9}, 4 * 2**0.5),  # the last crossing
        ({1: 1, 2: 1}, {1: 2, 2: 2}, 1),
        ({1: 2, 2: 2}, {1: 1, 2: 2}, None),  # as fast is not faster
        ({1: 1, 2: 1, 4: 1}, {2: 2}, 2),  # only lengths that both have
        ({1: 1}, {2: 1}, None),
    ],
)
def test_crossover(ours, other, expected) -> None:
    tokens = report.crossover(ours, other)
    assert tokens is None if expected is None else math.isclose(tokens, expected)


def test_crossovers_are_against_the_fastest_softmax() -> None:
    assert report.crossovers(list(sweep_rows())) == (
        "Forward: `lasp triton` is faster than the fastest softmax from 8192 tokens on"
        " (interpolated), 8.000 times at 65536.\n"
        "Backward: `lasp triton` is faster than the fastest softmax from 16384 tokens on"
        " (interpolated), 4.000 times at 65536.\n"
    )
