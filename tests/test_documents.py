"""Code blocks in the documents run, and links within the repository lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))


OVER_RANKS = ROOT / "docs" / "training.md"


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if path != OVER_RANKS], ids=lambda path: path.name
)
def test_python_blocks_run(path: Path) -> None:
    for block in python_blocks(path):
        subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT)


def test_the_recipes_of_training_run_on_two_ranks(tmp_path: Path) -> None:
    program = tmp_path / "training.py"
    program.write_text("\n".join(python_blocks(OVER_RANKS)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(program)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_local_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target
