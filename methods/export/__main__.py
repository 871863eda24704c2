"""Export a quantized checkpoint for other programs, with a model card.

python -m methods.export results/default/smollm2-135m/w4-g64/gptq/seed0 --format gguf --output exports/smollm2-w4

The first argument is the folder of a cell, whose results go into the card, or a checkpoint alone. OUTPUT is complete or
absent. What a format would have to round, or a program that reads it would leave out, is an error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from methods import export
from methods.core.job.files import announce, atomic_path, checkpoint_sha256
from methods.core.job.options import choose
from methods.export._card import read_cell, write_card


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    announce()
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Export one checkpoint. ValueError if the format cannot hold it, or if something is in OUTPUT already."""
    module = export.load(choose(args.format, export.available(), "format"))
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ValueError(f"{args.output} exists; remove it or name another folder")
    cell = read_cell(args.cell)
    module.check(cell.checkpoint, cell.config)

    # Everything above is checked before torch and transformers, which take seconds to import.
    from methods.core.job import runtime

    sha256 = checkpoint_sha256(cell.checkpoint)
    if cell.run is not None and cell.run["checkpoint_sha256"] != sha256:
        raise ValueError(
            f"{cell.checkpoint} is not the checkpoint that {cell.checkpoint.parent / 'run.json'} describes"
        )
    with atomic_path(args.output) as folder:
        folder.mkdir()
        module.write(cell.checkpoint, folder, cell.name)
        write_card(cell, module, folder, args.output.name, sha256, args.license, runtime.provenance())
    print(f"wrote {args.output}; what it is and how to load it: {args.output / 'README.md'}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m methods.export", description=__doc__.splitlines()[0])
    parser.add_argument("cell", type=Path, help="folder of a cell (checkpoint/, run.json, evals/), or of a checkpoint")
    parser.add_argument("--format", required=True, help=f"one of: {', '.join(export.available())}")
    parser.add_argument("--license", help="license of the model, for the card: an identifier of the Hub (apache-2.0)")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist, or be empty")
    return parser


if __name__ == "__main__":
    main()
