"""Continue a prompt: ``python -m lasp.generate CHECKPOINT "prompt"``.

CHECKPOINT is a folder that ``HybridModel.from_pretrained`` reads. Its ``tokenizer.json`` makes ids
of the prompt if the package ``tokenizers`` is installed; without it a prompt of whole numbers is
ids, and any other its UTF-8 bytes. Over ranks it is the same command under a launcher of
``lasp.launch``: keys and experts are spread over them all. It needs the extra ``hf``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import tyro
from rich.console import Console
from tyro.conf import Positional

from lasp.generation import Sampling
from lasp.hybrid import Generation, HybridModel
from lasp.launch import DeviceKind, choose_device, init_distributed, launched_rank
from moe_parallel import ExpertTopology


@dataclass(frozen=True)
class CommandOptions:
    """Continue a prompt with a model from disk.

    Attributes:
        checkpoint: folder of the model.
        prompt: text, or ids with spaces between where the folder has no tokenizer.
        max_new_tokens: at most.
        temperature: of the draws; 0 takes the best token.
        top_k: only so many best tokens can be drawn.
        top_p: only the best tokens that together reach this probability.
        suppress: ids that are never chosen.
        stop: ids that end the text.
        seed: of the draws.
        device: of the model; auto is a GPU if there is one for each rank.
        graph: on one GPU, a step is one CUDA graph.
        ep: ranks over which the experts are dealt out; by default all.
    """

    checkpoint: Positional[Path]
    prompt: Positional[str]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    suppress: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    seed: int = 0
    device: DeviceKind = "auto"
    graph: bool = False
    ep: int | None = None

    @property
    def sampling(self) -> Sampling:
        """The rule that chooses tokens."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.suppress, self.seed)


class Codec(NamedTuple):
    """Between text and ids.

    Attributes:
        name: what it is, for the reader.
        encode: ids of a text.
        decode: the text of ids.
    """

    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def codec_of(folder: Path, prompt: str) -> Codec:
    """The tokenizer of the folder; without one ids for a prompt of numbers, else bytes."""
    path = folder / "tokenizer.json"
    if path.exists() and find_spec("tokenizers") is not None:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(path))
        return Codec(
            "tokenizer.json",
            lambda text: list(tokenizer.encode(text).ids),
            lambda ids: str(tokenizer.decode(list(ids))),
        )
    missing = "no tokenizer.json" if not path.exists() else "the package tokenizers is missing"
    if all(word.isdecimal() for word in prompt.split()):
        return Codec(
            f"ids ({missing})",
            lambda text: [int(word) for word in text.split()],
            lambda ids: "".join(f" {token}" for token in ids),
        )
    return Codec(
        f"bytes ({missing})",
        lambda text: list(text.encode()),
        lambda ids: bytes(token for token in ids if token < 256).decode(errors="replace"),
    )


def run(options: CommandOptions, console: Console) -> Generation:
    """Load, continue, and print as tokens come."""
    device, ranks = _start(options.device)
    groups = None
    if ranks > 1:
        groups = ExpertTopology(ranks, cp=ranks, ep=options.ep or ranks).build_groups()
    model = HybridModel.from_pretrained(options.checkpoint, groups=groups, device=device)
    codec, shown = codec_of(options.checkpoint, options.prompt), ""
    ids: list[int] = []
    about = f"{options.checkpoint}: {ranks} ranks on {device.type}, {codec.name}"
    console.print(about, style="dim", markup=False, highlight=False, soft_wrap=True)
    how: dict[str, Any] = {"end": "", "markup": False, "highlight": False, "soft_wrap": True}
    console.print(options.prompt, style="bold", **how)

    def show(step: dict[int, int]) -> None:
        """Print what the text of all ids so far has beyond what is shown."""
        nonlocal shown
        ids.extend(step.values())
        text = codec.decode(ids)
        if not text.endswith("\ufffd"):  # the rest of a character is still to come
            console.print(text[len(shown) :], **how)
            shown = text

    found = model.generate(
        [codec.encode(options.prompt)],
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        stop_tokens=options.stop,
        graph=options.graph,
        on_step=show,
    )
    console.print(
        f"\n{found.prompt_tokens} tokens read in {found.prefill_s:.2f} s,"
        f" {len(found.tokens[0])} new, {found.tokens_per_s:.1f} tokens/s",
        style="dim",
        highlight=False,
    )
    return found


def _start(kind: DeviceKind) -> tuple[torch.device, int]:
    """This rank's device and how many ranks there are; one rank needs no group."""
    launch = launched_rank()
    if launch.world_size > 1:
        return init_distributed(kind), launch.world_size
    device = choose_device(kind, launch, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device, 1


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a bad argument or file ends with one line and status 1."""
    options = tyro.cli(CommandOptions, description=__doc__, args=arguments)
    try:
        run(options, Console(quiet=launched_rank().rank != 0))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
