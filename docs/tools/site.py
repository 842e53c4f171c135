"""What the site shows besides the pages of docs/: a hook of MkDocs, see mkdocs.yml.

README.md becomes the first page, CONTRIBUTING.md and CHANGELOG.md are pages, every example is a
page of its docstring, its command and its code. A file of the repository that a page links to is a
page of its text, so no link leads out of the site's tree. Decisions and tables get a page that
lists them by their titles.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "sh", ".cff": "yaml"}


def page_of(path: str) -> str | None:
    """Where the site has a file of the repository, relative to docs/; None if there is none."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        inside = path.removeprefix("docs/")
        return inside if (ROOT / path).is_file() else f"{inside.rstrip('/')}/index.md"
    return f"source/{path}.md" if (ROOT / path).is_file() else None


def links(text: str) -> list[str]:
    """Targets of a page's links within the repository, outside of code."""
    return [m[2] for m in LINK.finditer(FENCE.sub("", text)) if not re.match(r"\w+:|#", m[2])]


def rewrite(text: str, path: str, page: str) -> str:
    """The text of ``path`` with links from where the site has it to where it has their targets."""

    def target(match: re.Match[str]) -> str:
        found, _, anchor = match[2].partition("#")
        if re.match(r"\w+:", match[2]) or not found:
            return match[0]
        goal = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(path), found)))
        if goal is None:
            raise ValueError(f"{path}: a link must lead to a file of the repository, got {found}")
        relative = posixpath.relpath(goal, posixpath.dirname(page) or ".")
        return match[1] + relative + ("#" + anchor if anchor else "") + match[3]

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(p if p.startswith("```") else LINK.sub(target, p) for p in parts)


def lesson(path: Path) -> str:
    """The page of an example: what its docstring says, and the code."""
    code = path.read_text()
    match = re.match(r'"""(.*?)"""\n+', code, re.DOTALL)
    text = match[1] if match else path.name
    title, _, rest = text.strip().partition("\n")
    body = "\n".join(
        f"```sh\n{line.strip()}\n```"
        if re.match(r"\s*(python|torchrun|make) ", line)
        else re.sub(r"``([^`]+)``", r"`\1`", line)
        for line in rest.replace("::\n", ":\n").splitlines()
    )
    name = path.relative_to(ROOT)
    source = code[match.end() :] if match else code
    return (
        f"# {title.strip().rstrip('.')}\n\n`{name}`\n{body}\n\n```python\n{source.strip()}\n```\n"
    )


def source(path: Path) -> str:
    """The page of any other file."""
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {path.relative_to(ROOT)}\n\n````{language}\n{path.read_text().rstrip()}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of files outside docs/."""
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("0*.py")}
    texts = {path: (ROOT / path).read_text() for path in PAGES}
    for file in files.documentation_pages():
        texts["docs/" + file.src_uri] = Path(str(file.abs_src_path)).read_text()
    for path, text in texts.items():
        for link in links(text):
            goal = posixpath.normpath(
                posixpath.join(posixpath.dirname(path), link.partition("#")[0])
            )
            if not goal.startswith("docs/") and goal not in PAGES and (ROOT / goal).is_file():
                wanted.add(goal)
    for path, page in PAGES.items():
        wide = "---\nhide: [navigation]\n---\n\n" * (page == "index.md")
        content = wide + rewrite(texts[path], path, page)
        files.append(File.generated(config, page, content=content))
    for path in sorted(wanted):
        full = ROOT / path
        content = lesson(full) if path.startswith("examples/0") else source(full)
        files.append(File.generated(config, f"source/{path}.md", content=content))
    for folder, title in (("decisions", "Decisions"), ("tables", "Tables")):
        pages = [
            f.src_uri for f in files.documentation_pages() if f.src_uri.startswith(folder + "/")
        ]
        if f"{folder}/index.md" not in pages:
            listed = sorted(pages, reverse=folder == "decisions")
            lines = [f"- [{title_of(ROOT / 'docs' / p)}]({posixpath.basename(p)})" for p in listed]
            intro = INTRODUCTIONS[folder]
            text = f"# {title}\n\n{intro}\n\n" + "\n".join(lines) + "\n"
            files.append(File.generated(config, f"{folder}/index.md", content=text))
    return files


INTRODUCTIONS = {
    "decisions": "Why things are as they are: each page has what was chosen, what was rejected, and"
    " what was measured. Newest first.",
    "tables": "What was measured, by benchmark: every table is made from the rows in"
    " `benchmarks/results` by `python -m benchmarks.report`, and from nothing else.",
}


def title_of(path: Path) -> str:
    """The first heading of a page, after its date."""
    heading = path.read_text().partition("\n")[0].lstrip("# ")
    heading = re.sub(r"^\d{4}-\d\d-\d\d: ", "", heading)
    date = re.match(r"\d{4}-\d\d-\d\d", path.name)
    return heading[:1].upper() + heading[1:] + (f" ({date[0]})" if date else "")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files outside docs/ into links to their pages."""
    if page.file.generated_by:
        return markdown
    return rewrite(markdown, "docs/" + page.file.src_uri, page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Leave the roles of docstrings out, and the modules in front of names."""
    html = re.sub(r":(?:func|class|meth|mod|data|attr|obj):(?=<code>)", "", html)
    return re.sub(r"<code>~[\w.]*?(\w+)</code>", r"<code>\1</code>", html)
