"""``python -m lasp doctor``: what a bug report needs, and what is known to go wrong here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lasp.doctor.known import known_faults
from lasp.doctor.machine import gpus, links, variables, versions
from lasp.doctor.rules import exchange_rule, impl_rules, softmax_block_rules
from lasp.doctor.self_check import self_check

GUIDE = "docs/when-it-goes-wrong.md"
LARGEST_ERROR = 1e-10


def diagnose(*, measure_links: bool = False) -> dict[str, Any]:
    """Everything, as plain data: the keys are those of ``--json``.

    A section that fails is ``{"failed": error}``: a bug report needs the others all the more.

    Args:
        measure_links: copy between the GPUs, a second or so, to know their bandwidth.
    """
    installed = versions()
    sections: dict[str, Callable[[], Any]] = {
        "gpus": gpus,
        "links": lambda: links(measure=measure_links),
        "variables": variables,
        "lightning_attention and experts": impl_rules,
        "ring_attention": softmax_block_rules,
        "exchange": exchange_rule,
        "known_faults": lambda: [fault._asdict() for fault in known_faults(installed)],
        "self_check": self_check,
    }
    found = {title: _found_or_failed(examine) for title, examine in sections.items()}
    return {"machine": installed, **found, "guide": GUIDE}


def _found_or_failed(examine: Callable[[], Any]) -> Any:
    try:
        return examine()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _failed(section: Any) -> bool:
    return isinstance(section, dict) and "failed" in section


def _agrees(report: dict[str, Any]) -> bool:
    return all(error < LARGEST_ERROR for error in report["self_check"].values())


def is_sound(report: dict[str, Any]) -> bool:
    """Whether every section was found, and the operators agree with their oracles."""
    return not any(map(_failed, report.values())) and _agrees(report)


def as_text(report: dict[str, Any]) -> str:
    """The report for a person: a heading and a line for each entry."""
    lines: list[str] = []
    for title, held in report.items():
        if title == "guide":
            continue
        lines.append(f"\n{title.replace('_', ' ')}")
        entries = held.items() if isinstance(held, dict) else ((None, entry) for entry in held)
        lines += [_line(name, value) for name, value in entries] or ["  none"]
    if _failed(report["self_check"]):
        verdict = "could not be compared with their oracles."
    elif not _agrees(report):
        verdict = "DIFFER FROM their oracles."
    elif not is_sound(report):
        verdict = "agree with their oracles, but a section above failed."
    else:
        verdict = "agree with their oracles."
    lines.append(f"\nThe operators {verdict} Symptoms and remedies: {report['guide']}")
    return "\n".join(lines).lstrip("\n")


def _line(name: str | None, value: Any) -> str:
    if isinstance(value, dict):
        told = [f"{key}: {text}" for key, text in value.items() if text is not None]
        value = ("\n      " if "symptom" in value else "; ").join(told)
    if isinstance(value, float):
        value = f"largest difference from the oracle {value:.1e}"
    return f"  {value}" if name is None else f"  {name:30} {value}"
