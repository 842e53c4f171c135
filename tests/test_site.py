"""The site: its drawings are what their script draws, and every page can be found.

``make docs`` builds it and fails on a link that leads nowhere; .ci/run does so.
"""

from __future__ import annotations

import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
LISTED = ("decisions/", "tables/")  # by a page that the site makes


def test_drawings_are_what_their_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "docs/tools/diagrams.py"))
    for name, draw in script["DRAWINGS"].items():
        drawn = (script["FIGURES"] / name).read_text()
        assert drawn == draw().svg(), f"run python docs/tools/diagrams.py: {name}"


@pytest.mark.parametrize("package", ["lasp", "ring", "moe_parallel"])
def test_the_reference_lists_what_a_package_exports(package: str) -> None:
    page = (ROOT / f"docs/api/{package}.md").read_text()
    listed = re.findall(r"^        - (\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(importlib.import_module(package).__all__)


def test_the_navigation_has_every_page() -> None:
    named = set(re.findall(r": (\S+\.md)$", NAVIGATION, re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages - named if not page.startswith(LISTED)} == set()
    made = {
        "index.md",
        "contributing.md",
        "changelog.md",
        "examples.md",
        "decisions/index.md",
        "tables/index.md",
    }
    examples = {f"source/{path.relative_to(ROOT)}.md" for path in (ROOT / "examples").glob("0*.py")}
    assert named - pages <= made | examples
    assert examples <= named
