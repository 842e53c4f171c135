"""One word, one thing: names of classes, letters of shapes, and sentences."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for name in ("lasp", "ring", "moe_parallel") for path in (ROOT / name).rglob("*.py")
)
TREES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in FILES}
GLOSSARY = (ROOT / "docs/notation.md").read_text()


def public_types() -> dict[str, list[Path]]:
    """Where each public class and each alias of a type at the top of a module is defined."""
    where: dict[str, list[Path]] = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.Assign) and re.match(
                r"(Literal|Callable)\[", ast.unparse(node.value)
            ):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            else:
                continue
            for name in names:
                if not name.startswith("_"):
                    where[name].append(path)
    return where


def test_no_public_type_has_the_name_of_another() -> None:
    homonyms = {name: paths for name, paths in public_types().items() if len(paths) > 1}
    assert not homonyms


def shape_letters() -> dict[str, set[str]]:
    """Letters of shape suffixes, ``x_THK``, and the names that have them."""
    used: dict[str, set[str]] = defaultdict(set)
    for tree in TREES.values():
        for node in ast.walk(tree):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or ""
            if suffix := re.fullmatch(r"[a-z0-9_]+_([A-Z][A-Za-z]{0,4})", str(name)):
                for letter in suffix[1]:
                    used[letter].add(str(name))
    return used


def test_the_glossary_has_every_letter_of_a_shape() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", GLOSSARY, re.MULTILINE)
    defined = {letter for row in rows for letter in re.findall(r"\b[A-Za-z]\b", row)}
    missing = {letter: names for letter, names in shape_letters().items() if letter not in defined}
    assert not missing


def prose(path: Path) -> Iterator[str]:
    """Docstrings and comments; comments on adjacent lines are one text."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
    comments, last = "", -2
    for token in tokenize.generate_tokens(io.StringIO((ROOT / path).read_text()).readline):
        if token.type == tokenize.COMMENT:
            comments += ("\n" if token.start[0] == last + 1 else "\n\n") + token.string.lstrip("# ")
            last = token.start[0]
    yield comments


@pytest.mark.parametrize("path", TREES, ids=str)
def test_no_sentence_begins_with_of(path: Path) -> None:
    begun = [
        text[match.start() : match.start() + 60]
        for text in prose(path)
        for match in re.finditer(r"(?:\A|[.:?!]\s+|\n\s*\n\s*)Of\b", text)
    ]
    assert not begun
