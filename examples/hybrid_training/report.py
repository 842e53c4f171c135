"""What a person sees of a run: progress, metrics as JSON lines, a loss plot. Rank 0 only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hybrid_training.folder import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot


class Report:
    """Progress on the terminal (a bar there, plain lines elsewhere) and ``metrics.jsonl``.

    A resumed run drops the rows after the step it resumes from and goes on appending.
    """

    def __init__(self, folder: Path, *, first_step: int, steps: int, log_every: int) -> None:
        self.folder, self.log_every = folder, log_every
        self._path = folder / "metrics.jsonl"
        rows = [row for row in self._rows() if row["step"] < first_step]
        write_whole(self._path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = self._path.open("a", buffering=1)  # a row is on disk when its step ends
        self.console = Console()
        self._progress: Progress | None = None
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=steps, completed=first_step)
            self._progress.start()

    def _rows(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = self._path.read_text().splitlines(keepends=True)
        return [
            json.loads(line) for line in lines if line.endswith("\n")
        ]  # a kill may cut the last

    def step(self, row: dict[str, Any]) -> None:
        """Record one step; ``row`` holds the metrics, ``step`` among them."""
        self._file.write(json.dumps(row) + "\n")
        text = (
            f"loss {row['loss']:.3f}  aux {row['aux_loss']:.4f}"
            f"  {row['tokens_per_s']:,.0f} tokens/s  busiest expert x{row['expert_imbalance']:.2f}"
            f"  dropped {row['dropped_share']:.1%}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"] + 1, description=text)
        elif row["step"] % self.log_every == 0:
            self.console.print(f"step {row['step']:5d}  {text}", soft_wrap=True, highlight=False)

    def close(self, sample: str, unigram_entropy: float) -> None:
        """End the bar, draw ``loss.png``, show the sampled text and where the loss ended."""
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        rows = self._rows()
        figure, axes = pyplot.subplots(figsize=(7, 4))
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="loss")
        axes.axhline(unigram_entropy, color="grey", linestyle="--", label="unigram entropy")
        axes.set(xlabel="step", ylabel="nats a token")
        axes.legend()
        figure.savefig(self.folder / "loss.png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        self.console.rule("sample")
        self.console.print(sample, markup=False, highlight=False)
        self.console.rule()
        last = rows[-10:]
        loss = sum(row["loss"] for row in last) / len(last)
        self.console.print(
            f"loss {loss:.3f} nats a token (mean of the last {len(last)} steps), unigram entropy"
            f" {unigram_entropy:.3f}; metrics.jsonl, loss.png and checkpoints in {self.folder}",
            soft_wrap=True,
            highlight=False,
        )
