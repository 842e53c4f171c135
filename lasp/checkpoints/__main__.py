"""Convert checkpoints: ``python -m lasp.checkpoints convert IN OUT --to plain|megatron|hf``."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from lasp.checkpoints.convert import Conversion, Options, convert, plan
from lasp.checkpoints.folder import check_free
from lasp.checkpoints.source import open_source


def _convert(
    source: Positional[Path],
    out: Positional[Path],
    options: OmitArgPrefixes[Options],
    config: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Convert a checkpoint.

    Args:
        source: folder to read: released files, or a checkpoint of torch.distributed.checkpoint or
            of Megatron.
        out: folder to write.
        options: what to write.
        config: config.json of the model, where the folder to read has none.
        dry_run: read headers, check them, and print what would be written and the memory bound.
    """
    check_free(out)
    conversion = plan(open_source(source, config), options)
    print(_described(conversion))
    if not dry_run:
        convert(conversion, out, options)
        print(f"wrote {out}")


def _described(conversion: Conversion) -> str:
    source = conversion.source
    names = {tensor.name for tensor, _ in conversion.tensors}
    skipped = sorted(name for name in source.storage.tensors if source.family.skips(name))
    lines = [
        f"{source.family.name}, {len(source.storage.tensors) - len(skipped)} tensors"
        f" -> {conversion.family.name}, {len(names)} tensors, {conversion.num_bytes:,} bytes",
        f"memory: at most {conversion.largest_bytes / 1e9:.2f} GB beside Python and torch",
    ]
    if skipped:
        lines.append(f"left out: {len(skipped)} tensors, {skipped[0]} and the like")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a bad argument or file ends with one line and status 1."""
    try:
        tyro.extras.subcommand_cli_from_dict({"convert": _convert}, args=arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
