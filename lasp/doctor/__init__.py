"""``python -m lasp doctor``: what a bug report needs, and what is known to go wrong here."""

from __future__ import annotations

from typing import Any

from lasp.doctor.known import known_faults
from lasp.doctor.machine import gpus, links, variables, versions
from lasp.doctor.rules import exchange_rule, impl_rules, softmax_block_rules
from lasp.doctor.self_check import self_check

GUIDE = "docs/when-it-goes-wrong.md"
LARGEST_ERROR = 1e-10


def diagnose(*, measure_links: bool = False) -> dict[str, Any]:
    """Everything, as plain data: the keys are those of ``--json``.

    Args:
        measure_links: copy between the GPUs, a second or so, to know their bandwidth.
    """
    installed = versions()
    return {
        "machine": installed,
        "gpus": gpus(),
        "links": links(measure=measure_links),
        "variables": variables(),
        "lightning_attention and experts": impl_rules(),
        "ring_attention": softmax_block_rules(),
        "exchange": exchange_rule(),
        "known_faults": [fault._asdict() for fault in known_faults(installed)],
        "self_check": self_check(),
        "guide": GUIDE,
    }


def is_sound(report: dict[str, Any]) -> bool:
    """Whether the operators agree with their oracles."""
    return all(error < LARGEST_ERROR for error in report["self_check"].values())


def as_text(report: dict[str, Any]) -> str:
    """The report for a person: a heading and a line for each entry."""
    lines: list[str] = []
    for title, held in report.items():
        if title == "guide":
            continue
        lines.append(f"\n{title.replace('_', ' ')}")
        entries = held.items() if isinstance(held, dict) else ((None, entry) for entry in held)
        lines += [_line(name, value) for name, value in entries] or ["  none"]
    sound = "agree with" if is_sound(report) else "DIFFER FROM"
    lines.append(f"\nThe operators {sound} their oracles. Symptoms and remedies: {report['guide']}")
    return "\n".join(lines).lstrip("\n")


def _line(name: str | None, value: Any) -> str:
    if isinstance(value, dict):
        told = [f"{key}: {text}" for key, text in value.items() if text is not None]
        value = ("\n      " if "symptom" in value else "; ").join(told)
    if isinstance(value, float):
        value = f"largest difference from the oracle {value:.1e}"
    return f"  {value}" if name is None else f"  {name:30} {value}"
