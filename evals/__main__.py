"""Evaluate one checkpoint: folder -> result JSON, with per-item values in a Parquet file beside it.

python -m evals perplexity --checkpoint results/try/checkpoint --options '{window: 512}' \
    --tokens resources/tokens/micro/squad.safetensors --output results/try/evals/perplexity.json
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import evals
from methods import declaration
from methods.core.files import atomic_path, read_json, write_json
from methods.core.options import build_config, choose, mapping


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    failed = args.output.with_suffix(".failed.json")
    failed.unlink(missing_ok=True)
    try:
        run(args)
    except Exception as error:
        traceback.print_exc()
        write_json(
            failed, {"evaluation": args.evaluation, "error": f"{type(error).__name__}: {error}", "log": args.log}
        )
        sys.exit(1)


def run(args: argparse.Namespace) -> None:
    """Evaluate one checkpoint. ValueError for options or tokens that do not fit."""
    choose(args.evaluation, evals.available(), "evaluation")
    declared = declaration(evals.FOLDER / f"{args.evaluation}.py")
    config = build_config(declared.Config, args.options, f"evaluation {args.evaluation}")
    if declared.DATA == "tokens" and args.tokens is None:
        raise ValueError(f"evaluation {args.evaluation} needs tokens: --tokens FILE")

    # Everything above is checked before torch and transformers, which take seconds to import.
    import pandas as pd

    from methods.core import runtime
    from methods.core.checkpoint import checkpoint_sha256, load_model
    from methods.core.log import RunLog

    runtime.set_up(args.threads, seed=0)
    log = RunLog()
    sha256 = checkpoint_sha256(args.checkpoint)
    run_file = args.checkpoint.parent / "run.json"
    cell = read_json(run_file)["cell"] if run_file.is_file() else None
    dtype = runtime.compute_dtype(args.checkpoint)
    model = load_model(args.checkpoint, dtype).to(runtime.device())
    start = time.perf_counter()
    result = evals.load(args.evaluation).evaluate(model, config, args.tokens, log)
    seconds = time.perf_counter() - start
    if result.items:
        with atomic_path(args.output.with_suffix(".parquet")) as temporary:
            pd.DataFrame(result.items).to_parquet(temporary, compression="zstd", index=False)
    write_json(
        args.output,
        {
            "cell": cell,
            "evaluation": args.evaluation,
            "protocol": result.protocol,
            "options": asdict(config),
            "metrics": result.metrics,
            "data": result.data,
            "n": result.n,
            "partial": result.partial,
            "departures": log.departures,
            "checkpoint_sha256": sha256,
            "seconds": round(seconds, 2),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "provenance": runtime.provenance(),
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__.splitlines()[0])
    parser.add_argument("evaluation", help=f"one of: {', '.join(evals.available())}")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that from_pretrained loads")
    parser.add_argument("--options", type=mapping, default={}, help="the evaluation's options, YAML or JSON mapping")
    parser.add_argument("--tokens", type=Path, help="tokenized text, from python -m workflow.scripts.tokenize")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--log", help="path of the log file, to be named in the failure record")
    parser.add_argument("--output", type=Path, required=True, help="result file")
    return parser


if __name__ == "__main__":
    main()
