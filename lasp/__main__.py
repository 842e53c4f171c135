"""``python -m lasp doctor``: versions, devices, rules, known faults and a self check."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from lasp.doctor import as_text, diagnose, is_sound


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; 1 if a section failed, or an operator differs from its oracle."""
    parser = argparse.ArgumentParser(prog="python -m lasp", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["doctor"], default="doctor")
    parser.add_argument("--json", action="store_true", help="for a program, or a bug report")
    parser.add_argument("--links", action="store_true", help="measure copies between the GPUs")
    options = parser.parse_args(arguments)
    report = diagnose(measure_links=options.links)
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 0 if is_sound(report) else 1


if __name__ == "__main__":
    sys.exit(main())
