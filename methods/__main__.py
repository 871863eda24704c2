"""One step of a recipe: model or earlier step's checkpoint + scheme + method -> checkpoint and run.json.

python -m methods gptq --model resources/models/micro --scheme '{weights: {bits: 3, group_size: 64}}' \
    --tokens resources/tokens/micro/calibration.safetensors --samples 64 --sequence-length 512 --output results/try

Writes OUTPUT/checkpoint and OUTPUT/run.json. If the method fails, OUTPUT/failed.json says why and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

from methods.core.job import ranks, registry
from methods.core.job.files import announce, exclusive, write_json
from methods.core.job.options import mapping
from methods.core.step.plan import cell_of, check

GRACE = 10  # seconds in which the first process may write why it failed too, before torchrun ends it


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    announce()
    failed = args.output / "failed.json"
    with exclusive(args.output) if ranks.leads() else nullcontext():
        if ranks.leads():
            failed.unlink(missing_ok=True)
        try:
            plan = check(args)
            from methods.core.step.run import run  # takes seconds, which a mistake should not cost

            run(plan)
        except Exception as error:
            traceback.print_exc()
            if not ranks.leads():
                time.sleep(GRACE)
                sys.exit(1)
            write_json(failed, {"cell": cell_of(args), "error": f"{type(error).__name__}: {error}", "log": args.log})
            sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m methods", description=__doc__.splitlines()[0])
    parser.add_argument("method", help=f"one of: {', '.join(registry.names('methods'))}")
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared full-precision model")
    parser.add_argument(
        "--scheme", type=mapping, default={}, help="YAML or JSON mapping, as under schemes: in a configuration"
    )
    parser.add_argument(
        "--allocation", type=Path, help="bits by layer, from python -m workflow.prepare.allocate, for average_bits"
    )
    parser.add_argument("--cell", type=mapping, help="the names of model, scheme and method in results")
    parser.add_argument("--options", type=mapping, default={}, help="the method's options, YAML or JSON mapping")
    parser.add_argument("--tokens", type=Path, help="tokenized text, from python -m workflow.prepare.tokenize")
    parser.add_argument("--samples", type=int, default=64, help="sequences taken from the tokens (default 64)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--batch-size", type=int, default=4, help="training: sequences per forward pass (default 4)")
    parser.add_argument("--accumulation", type=int, default=1, help="training: passes per step (default 1)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="training: less memory, more time")
    parser.add_argument(
        "--init-from", type=Path, metavar="CHECKPOINT", help="start from the checkpoint that an earlier step left"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--log", help="path of the log file, to be named in failed.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cell")
    return parser


if __name__ == "__main__":
    main()
