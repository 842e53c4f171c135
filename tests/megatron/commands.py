"""The command lines of Megatron-LM's training scripts as docs/megatron.md has them."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

DOCUMENT = Path(__file__).parents[2] / "docs" / "megatron.md"


class Command(NamedTuple):
    """``NAME=VALUE ... torchrun LAUNCH... SCRIPT ARGUMENTS...``

    Attributes:
        script: name of the script, in the checkout's root.
        environment: what stands before ``torchrun``.
        launch: arguments of torchrun itself.
        arguments: of the script.
    """

    script: str
    environment: dict[str, str]
    launch: list[str]
    arguments: list[str]

    @property
    def name(self) -> str:
        return self.script.removesuffix(".py")

    def line(self, *more: str, script: list[str] | None = None) -> list[str]:
        """What to execute. Later arguments win over earlier ones, so ``more`` changes options.

        Args:
            more: arguments after the documented ones.
            script: what is run in the place of the script.
        """
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, *self.launch, *(script or [self.script]), *self.arguments, *more]


def documented_commands() -> list[Command]:
    """Every torchrun of a ``pretrain_*.py`` at the root of Megatron-LM, in the document's order."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    commands = [_parse(words) for line in lines if "torchrun" in (words := shlex.split(line))]
    return [command for command in commands if re.fullmatch(r"pretrain_\w+\.py", command.script)]


def _parse(words: list[str]) -> Command:
    at = words.index("torchrun")
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    environment = dict(word.split("=", 1) for word in words[:at])
    return Command(words[script], environment, words[at + 1 : script], words[script + 1 :])
