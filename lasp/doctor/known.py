"""Versions of others that were seen to go wrong, how it shows, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class KnownFault(NamedTuple):
    """A package that goes wrong in some versions.

    Attributes:
        package: its name on PyPI.
        versions: in which, ``>=2.5,<2.14``.
        symptom: what a user sees.
        remedy: what to do.
    """

    package: str
    versions: str
    symptom: str
    remedy: str


KNOWN_FAULTS = (
    KnownFault(
        "torch",
        ">=2.5,<2.14",
        "after a restart by torchrun --max-restarts ranks hang or end with 'connectFullMesh"
        " failed', as they read addresses of dead ranks (pytorch issue 135712)",
        "make groups by lasp.launch.init_distributed, which names attempts on one host; on several"
        " hosts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun",
    ),
    KnownFault(
        "torch",
        ">=2.11,<2.14",
        "a rank that has finished aborts at its exit, as groups that were there when torch loaded"
        " its compiler are never freed; optimizers load it",
        "import torch._dynamo before process groups are made",
    ),
    KnownFault(
        "torch",
        ">=2.13,<2.14",
        "torch.nn.functional.linear_cross_entropy adds up losses and gradients in bfloat16",
        "lasp.hybrid.linear_cross_entropy",
    ),
    KnownFault(
        "triton",
        ">=3.6,<3.7",
        "kernels write out of shared memory for operands of fewer than 64 columns on Hopper",
        "pad operands to 64 columns in kernels of your own; those of lasp are",
    ),
    KnownFault(
        "megatron-core",
        "<0.16",
        "lasp.megatron fails at import",
        "pip install 'lasp-plus[megatron]'",
    ),
    KnownFault(
        "megatron-core",
        ">=0.21",
        "lasp.megatron fails at import",
        "pip install 'lasp-plus[megatron]'",
    ),
    KnownFault(
        "megatron-core",
        ">=0.16,<0.18",
        "HybridModel cannot be built",
        "use GPTModel, or megatron-core 0.18 or newer",
    ),
    KnownFault(
        "megatron-core",
        ">=0.19,<0.20",
        "losses differ after a resume from a fully_reshardable checkpoint of the distributed"
        " optimizer with overlap_grad_reduce, whose moments are wrong in more than one bucket",
        "save without overlap_grad_reduce, or with a bucket size above the model's",
    ),
    KnownFault(
        "megatron-core",
        ">=0.19",
        "--use-distributed-optimizer trains and saves but fails an assertion when it resumes"
        " without Apex and TransformerEngine",
        "leave it out, or install TransformerEngine",
    ),
    KnownFault(
        "flash-attn-4",
        "!=4.0.0b36",
        "ring_attention(block='fa4') refuses: its interface differs between betas",
        "pip install 'lasp-plus[fa4]'",
    ),
)


def known_faults(installed: Mapping[str, str]) -> list[KnownFault]:
    """The faults of the packages that are installed, by name and version."""
    return [
        fault
        for fault in KNOWN_FAULTS
        if (found := _numbers(installed.get(fault.package, "")))
        and all(_holds(found, bound) for bound in fault.versions.split(","))
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, with that of a beta last: ``2.11.0+cu130`` is (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def _holds(found: tuple[int, ...], bound: str) -> bool:
    sign, limit = bound.rstrip("0123456789.b"), _numbers(bound)
    return {
        "<": found < limit,
        "!=": found != limit,
        ">=": found >= limit,
    }[sign]
