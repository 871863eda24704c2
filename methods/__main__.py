"""One cell of the matrix: model + scheme + method -> checkpoint and run.json.

python -m methods gptq --model resources/models/micro --scheme '{weights: {bits: 3, group_size: 64}}' \
    --tokens resources/tokens/micro/calibration.safetensors --samples 64 --sequence-length 512 --output results/try

Writes OUTPUT/checkpoint and OUTPUT/run.json. If the method fails, OUTPUT/failed.json says why and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import methods
from methods.core.files import atomic_path, read_json, write_json
from methods.core.options import build_config, choose, mapping
from methods.core.scheme import Scheme


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    failed = args.output / "failed.json"
    failed.unlink(missing_ok=True)
    try:
        run(args)
    except Exception as error:
        traceback.print_exc()
        write_json(failed, {"cell": _cell(args), "error": f"{type(error).__name__}: {error}", "log": args.log})
        sys.exit(1)


def run(args: argparse.Namespace) -> None:
    """Quantize one cell. ValueError for options, schemes or tokens that do not fit; the method's own errors besides."""
    choose(args.method, methods.available(), "method")
    declared = methods.declaration(methods.FOLDER / f"{args.method}.py")
    config = build_config(declared.Config, args.options, f"method {args.method}")
    scheme = Scheme.from_dict(_cell(args)["scheme"], args.scheme)
    if declared.check:
        declared.check(scheme, config)

    # Everything above is checked before torch and transformers, which take seconds to import.
    from methods.core import runtime
    from methods.core.checkpoint import checkpoint_sha256, load_model, save_checkpoint
    from methods.core.log import RunLog
    from methods.core.modules import unquantizable_parameters

    runtime.set_up(args.threads, args.seed)
    log = RunLog()
    tokens, tokens_info = None, None
    if declared.DATA != "none":
        if args.tokens is None:
            raise ValueError(f"method {args.method} needs {declared.DATA} tokens: --tokens FILE")
        from methods.core.tokens import sample_windows

        tokens, tokens_info = sample_windows(args.tokens, args.samples, args.sequence_length, args.seed)

    start = time.perf_counter()
    with log.timer("load"):
        model = load_model(args.model, runtime.compute_dtype())
    if declared.QUANTIZES and (left := unquantizable_parameters(model)):
        log.departure(f"not linear layers, stay in full precision: {', '.join(left)}")
    before = _weights(model)
    log.info(f"{args.method}: {len(before)} linear layers of {args.model}, scheme {scheme.name}")
    with log.timer("quantize"):
        model = methods.load(args.method).quantize(model, scheme, config, tokens, log)
    layers = _layer_table(model, before, log)
    if declared.QUANTIZES and (left := [row["layer"] for row in layers if row["bits"] is None]):
        raise RuntimeError(f"{args.method} left layers in full precision: {', '.join(left)}")
    with atomic_path(args.output / "checkpoint") as folder, log.timer("save"):
        save_checkpoint(model, args.model, folder)

    write_json(
        args.output / "run.json",
        {
            "cell": _cell(args),
            "scheme": args.scheme,
            "options": asdict(config),
            "data": declared.DATA,
            "tokens": tokens_info,
            "model": read_json(args.model / "manifest.json"),
            "checkpoint_sha256": checkpoint_sha256(args.output / "checkpoint"),
            "size": _size(model, args.output / "checkpoint"),
            "seconds": {"total": round(time.perf_counter() - start, 2)}
            | {k: round(v, 2) for k, v in log.seconds.items()},
            "peak_memory_mb": runtime.peak_memory_mb(),
            "departures": log.departures,
            "layers": layers,
            "provenance": runtime.provenance(),
        },
    )


def _cell(args: argparse.Namespace) -> dict:
    return {"model": args.model.name, "scheme": "custom", "method": args.method, "seed": args.seed} | (args.cell or {})


def _weights(model) -> dict:
    from methods.core.modules import block_linears

    return {name: linear.weight.detach().clone() for name, linear in block_linears(model).items()}


def _layer_table(model, before: dict, log) -> list[dict]:
    """One row per linear layer of the decoder blocks: its grid, the relative weight error, and the method's own facts."""
    rows = []
    for name, original in before.items():
        module = model.get_submodule(name)
        grid = getattr(module, "grid", None)
        change = (module.weight.detach().to(original) - original).float()
        rows.append(
            {
                "layer": name,
                "shape": list(original.shape),
                "bits": grid and grid.bits,
                "group_size": grid and grid.group_size,
                "symmetric": grid and grid.symmetric,
                "weight_error": float(change.norm() / original.float().norm()),
                **log.layers.get(name, {}),
            }
        )
    return rows


def _size(model, checkpoint: Path) -> dict:
    """True size: bits per weight of the linear layers in the decoder blocks, as stored, and of the whole checkpoint."""
    from methods.core.checkpoint import stored_sizes

    bits, weights, parameters = stored_sizes(model, checkpoint)
    total = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    return {
        "bits_per_weight": bits / weights,
        "quantizable_weights": weights,
        "parameters": parameters,
        "size_mb": total / 1e6,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m methods", description=__doc__.splitlines()[0])
    parser.add_argument("method", help=f"one of: {', '.join(methods.available())}")
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared full-precision model")
    parser.add_argument(
        "--scheme", type=mapping, default={}, help="YAML or JSON mapping, as under schemes: in a configuration"
    )
    parser.add_argument("--cell", type=mapping, help="the names of model, scheme and method in results")
    parser.add_argument("--options", type=mapping, default={}, help="the method's options, YAML or JSON mapping")
    parser.add_argument("--tokens", type=Path, help="tokenized text, from python -m workflow.scripts.tokenize")
    parser.add_argument("--samples", type=int, default=64, help="sequences taken from the tokens (default 64)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per sequence (default 512)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--log", help="path of the log file, to be named in failed.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cell")
    return parser


if __name__ == "__main__":
    main()
