"""Tables between two marks of a page, made of committed rows: printed, or written there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness import RESULTS, parse


@dataclass
class Options:
    """Where the rows are, and the page whose tables are written."""

    results: Path = RESULTS
    write: Path | None = None


class MarkedTables(NamedTuple):
    """What stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.

    Attributes:
        name: of the marks.
        made: the tables, of the rows in a folder.
    """

    name: str
    made: Callable[[Path], str]

    def rewritten(self, page: str, folder: Path) -> str:
        """The page with the tables between its marks."""
        begin, end = f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"
        before, _, rest = page.partition(begin)
        return f"{before}{begin}\n\n{self.made(folder)}\n\n{end}{rest.partition(end)[2]}"

    def answer(self, doc: str | None) -> None:
        """Print the tables, or write them, as the command line says."""
        options = parse(Options, doc)
        if options.write is None:
            print(self.made(options.results))
        else:
            page = options.write.read_text()
            options.write.write_text(self.rewritten(page, options.results))
