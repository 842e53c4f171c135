"""Every code block of README and docs: Python runs, commands name what is there.

The Python blocks of a page are one program, in their order. A block that cannot run has a line
above it, ``<!-- not run: WHY -->``; its imports are checked all the same. Commands are read word by
word: modules, scripts, targets, extras and flags must exist.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += [*sorted((ROOT / "examples").rglob("*.md"))]
OVER_RANKS = ROOT / "docs/training.md"
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
GROUPS = PROJECT["dependency-groups"]
OURS = ("lasp", "ring", "moe_parallel")
# Commands of others that a page may show; what they start is checked from its first word on.
OTHERS = {
    "cd",
    "git",
    "export",
    "srun",
    "sbatch",
    "salloc",
    "mpirun",
    "ssh",
    "scontrol",
    "nvidia-smi",
}
STARTERS = ("python", "python3", "torchrun", "pytest", "make", "pip")
TORCHRUN = re.compile(
    r"--(standalone|nproc-per-node|nnodes|node-rank|rdzv-\w+|master-\w+|max-restarts)"
)


class Block(NamedTuple):
    """A code block: why it does not run, if it does not."""

    language: str
    text: str
    why: str | None


def blocks(page: Path) -> list[Block]:
    return [Block(m["language"], m["text"], m["why"]) for m in FENCE.finditer(page.read_text())]


def program(page: Path) -> str:
    return "\n".join(b.text for b in blocks(page) if b.language == "python" and b.why is None)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_that_is_checked(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n```") == 2 * len(blocks(page)), "a fence is not closed, or is indented"
    for block in blocks(page):
        assert block.language in ("python", "sh", "text"), block


@pytest.mark.parametrize("page", [p for p in PAGES if p != OVER_RANKS and program(p)], ids=name)
def test_python_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(program(page))
    runpy.run_path("page.py")


def test_the_recipes_of_training_run_on_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(program(OVER_RANKS))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launcher, "--nproc-per-node", "2", str(tmp_path / "training.py")],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_that_do_not_run_import_what_is_there(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python" or block.why is None:
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OURS:
                path = ROOT / str(node.module).replace(".", "/")
                source = (
                    path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
                ).read_text()
                for alias in node.names:
                    assert re.search(rf"\b{alias.name}\b", source), f"{node.module}.{alias.name}"


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command, variables put in, what is set in front of it left out."""
    variables: dict[str, str] = {}
    line = ""
    for part in text.splitlines():
        line += part
        if line.endswith("\\"):
            line = line[:-1] + " "
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation goes on
            line += " "
            continue
        line = ""
        for name, value in variables.items():
            words = [new for w in words for new in (value.split() if w == f"${name}" else [w])]
        while words and re.match(r"\w+=", words[0]):
            key, _, value = words.pop(0).partition("=")
            variables[key] = value
        if words:
            yield words
    assert not line, f"a command is not complete: {line}"


def source_of(words: list[str]) -> str:
    """The text that knows the flags of ``python WORDS``, and that of its neighbours."""
    if words[0] == "-m":
        module = words[1]
        if importlib.util.find_spec(module.split(".")[0]) is None or module in ("venv", "pytest"):
            return ""
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"no module {module}"
        path = ROOT / module.replace(".", "/")
        files = [*path.rglob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
        files += [ROOT / "benchmarks/harness.py"] * module.startswith("benchmarks.")
    else:
        script = ROOT / words[0]
        assert script.exists(), f"no file {words[0]}"
        files = [script, *script.parent.glob("hybrid_*/*.py"), *script.parent.glob("hybrid_*.py")]
    return "\n".join(file.read_text() for file in files)


def check_flags(words: list[str], source: str) -> None:
    for word in words:
        flag = word.partition("=")[0]
        if source and re.match(r"--[a-z]", flag):
            field = flag.removeprefix("--").replace("-", "_")
            assert re.search(rf"\b{field}\b|{flag}\b", source), f"no flag {flag}: {' '.join(words)}"


def check_pip(words: list[str]) -> None:
    text = " ".join(words)
    for extras in re.findall(r"(?:\.|lasp-plus)\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= EXTRAS.keys(), f"no such extra: {text}"
    for group in re.findall(r"--group (\w+)", text):
        assert group in GROUPS, f"no such group: {text}"


def check(words: list[str]) -> None:
    """Fail where a command names something that is not there."""
    head = Path(words[0]).name
    if head in OTHERS:
        started = [i for i, word in enumerate(words) if Path(word).name in STARTERS]
        if started:
            check(words[started[0] :])
    elif head == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert all(word in targets for word in words[1:] if "=" not in word), words
    elif head == "pip" or words[1:3] == ["-m", "pip"]:
        check_pip(words)
    elif head == "pytest" or words[1:3] == ["-m", "pytest"]:
        paths = [word for word in words if word.startswith("tests")]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths), words
    elif head == "torchrun":
        rest = words[1:]
        while rest and rest[0].startswith("--"):
            assert TORCHRUN.match(rest[0]), f"no flag {rest[0]} of torchrun"
            takes_value = "=" not in rest[0] and rest[0] != "--standalone"
            rest = rest[1 + takes_value :]
        check_flags(rest, source_of(rest))
    elif head in ("python", "python3"):
        check_flags(words[1:], source_of(words[1:]))
    elif head.endswith(".sh"):
        assert (ROOT / words[0]).exists(), f"no script {words[0]}"
    else:
        raise AssertionError(f"unknown command {head}: say above its block why it is not run")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_name_what_is_there(page: Path) -> None:
    for block in blocks(page):
        if block.language == "sh" and block.why is None:
            for words in commands(block.text):
                check(words)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make tests", "tests"),
        ("python -m lasp.nothing", "no module"),
        ("python examples/missing.py", "no file"),
        ("python -m lasp.generate folder prompt --max-tokens 3", "no flag --max-tokens"),
        ("torchrun --nproc_per_node 4 examples/04_moe.py", "of torchrun"),
        ('pip install -e ".[checkpoint]"', "no such extra"),
        ("frobnicate", "unknown command"),
    ],
)
def test_a_wrong_command_is_seen(command: str, message: str) -> None:
    (words,) = commands(command)
    with pytest.raises(AssertionError, match=message):
        check(words)
