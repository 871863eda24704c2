"""One cell of the matrix: model + scheme + method -> checkpoint and run.json.

python -m methods gptq --model resources/models/micro --scheme '{weights: {bits: 3, group_size: 64}}' \
    --tokens resources/tokens/micro/calibration.safetensors --samples 64 --sequence-length 512 --output results/try

Writes OUTPUT/checkpoint and OUTPUT/run.json. If the method fails, OUTPUT/failed.json says why and the exit code is 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from methods.core.job import registry
from methods.core.job.files import RESIDUALS, announce, atomic_path, read_json, sha256_file, write_json
from methods.core.job.options import build_config, choose, mapping
from methods.core.job.sources import code_sha256
from methods.core.scheme import Scheme


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    announce()
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
    choose(args.method, registry.names("methods"), "method")
    declared = registry.declaration("methods", args.method)
    method = declared.of
    config = build_config(declared.Config, args.options, f"method {args.method}")
    if not (args.model / "manifest.json").is_file():
        raise ValueError(
            f"{args.model} is not a prepared model; python -m workflow.prepare.model makes one of any model"
        )
    allocation = _read_allocation(args.allocation) if args.allocation else None
    bits = {row["layer"]: row["bits"] for row in allocation["layers"]} if allocation else None
    scheme = Scheme.from_dict(_cell(args)["scheme"], args.scheme, bits)
    if method.quantizes and scheme.weights is None:
        raise ValueError(
            f"method {args.method} needs a scheme with weights, such as --scheme '{{weights: {{bits: 4}}}}'"
        )
    if declared.check:
        declared.check(scheme, config)
    if method.reads != "none" and args.tokens is None:
        raise ValueError(f"method {args.method} needs {method.reads} tokens: --tokens FILE")
    if scheme.weights and scheme.weights.mixed != bool(allocation):
        raise ValueError("--allocation FILE belongs to a scheme with average_bits, and to no other")
    allocated = _allocated(args, allocation, scheme) if allocation else None
    start = _start(args, allocated, declared, config) if args.init_from else None

    # Everything above is checked before torch and transformers, which take seconds to import.
    import torch

    from methods.core.job import runtime
    from methods.core.job.log import RunLog
    from methods.core.model.activations import mark_layers
    from methods.core.model.anatomy import block_linears, checkpoint_blocks, unquantizable_parameters
    from methods.core.model.checkpoint import checkpoint_sha256, load_model, load_residuals, save_checkpoint
    from methods.core.tokens import check_length, sample_windows

    runtime.set_up(args.threads, args.seed)
    dtype = runtime.compute_dtype(args.model)
    if method.trains and dtype == torch.float16:
        dtype = torch.float32  # gradients of a loss over a large vocabulary underflow in fp16
    tokens, tokens_info = None, None
    if method.reads != "none":
        tokens, tokens_info = sample_windows(args.tokens, args.samples, args.sequence_length, args.seed)
    if method.trains:
        if args.samples % (args.accumulation * args.batch_size):
            raise ValueError(f"{args.samples} samples are not whole steps of {args.accumulation} x {args.batch_size}")
        tokens = tokens.unflatten(0, (-1, args.accumulation, args.batch_size))
        tokens_info |= {"batch_size": args.batch_size, "accumulation": args.accumulation}
    # A training resumes only what was started with the very same settings and code.
    settings = {
        "cell": _cell(args),
        "scheme": args.scheme,
        "allocation": allocated,
        "options": asdict(config),
        "tokens": tokens_info,
        "model": read_json(args.model / "manifest.json"),
        "init_from": start,
        "computes": f"{dtype}, {runtime.device().type}, torch {torch.__version__}",
        "code_sha256": code_sha256("methods/__main__.py", f"methods/{args.method}.py"),
    }
    log = RunLog(args.output / "training")
    settings_file = log.folder / "settings.json"
    if settings_file.is_file() and read_json(settings_file) != settings:
        shutil.rmtree(log.folder)
    if method.trains:
        write_json(settings_file, settings)

    started = time.perf_counter()
    with log.timer("load"):
        model = load_model(args.init_from or args.model, dtype)
        if args.init_from:
            load_residuals(model, args.init_from)
    if tokens is not None:
        check_length(model, args.sequence_length, "sequence length")
    if method.quantizes and (left := unquantizable_parameters(model)):
        log.departure(f"not linear layers, stay in full precision: {', '.join(left)}")
    linears = block_linears(model)
    if broken := [name for name, linear in linears.items() if not linear.weight.isfinite().all()]:
        raise ValueError(f"{args.init_from or args.model}: weights that are not finite in {', '.join(broken)}")
    names = list(linears)
    del linears  # else every replaced layer would be kept
    mark_layers(model, scheme)
    log.info(f"{args.method}: {len(names)} linear layers of {args.model}, scheme {scheme.name}")
    with log.timer("quantize"):
        if args.gradient_checkpointing:
            checkpoint_blocks(model)
        model = registry.load("methods", args.method).apply(model, scheme, config, tokens, log).cpu()
    peak_memory_mb = runtime.peak_memory_mb()
    if method.quantizes and (left := [n for n in names if not hasattr(model.get_submodule(n), "grid")]):
        raise RuntimeError(f"{args.method} left layers in full precision: {', '.join(left)}")
    with atomic_path(args.output / "checkpoint") as folder, log.timer("save"):
        save_checkpoint(model, args.model, folder)

    seconds = {"total": time.perf_counter() - started, **log.seconds}
    (log.folder / "state.safetensors").unlink(missing_ok=True)
    write_json(
        args.output / "run.json",
        {
            "cell": _cell(args),
            "module": args.method,
            "scheme": args.scheme,
            "allocation": allocated,
            "options": asdict(config),
            "tokens": tokens_info,
            "init_from": start,
            "training": log.training and log.training | {"gradient_checkpointing": args.gradient_checkpointing},
            "model": read_json(args.model / "manifest.json"),
            "checkpoint_sha256": checkpoint_sha256(args.output / "checkpoint"),
            "seconds": {name: round(value, 2) for name, value in seconds.items()},
            "peak_memory_mb": peak_memory_mb,
            "departures": log.departures,
            "layers": _layer_table(
                model, args.model if _quantized(start) else args.init_from or args.model, names, log
            ),
            "compute_dtype": str(dtype).removeprefix("torch."),
            "provenance": runtime.provenance(),
        },
    )


def _read_allocation(path: Path) -> dict:
    """ValueError if the file is not one of workflow/prepare/allocate.py."""
    allocation = read_json(path)
    if not isinstance(allocation, dict) or not {"weights", "layers"} <= allocation.keys():
        raise ValueError(f"--allocation {path} is not a file of python -m workflow.prepare.allocate")
    return allocation


def _allocated(args: argparse.Namespace, allocation: dict, scheme: Scheme) -> dict:
    """What is recorded of the file that gives each layer its bits. ValueError if it is of another scheme or model."""
    weights = Scheme.from_dict("", {"weights": allocation["weights"]}).weights
    if weights != scheme.weights or allocation["model"] != read_json(args.model / "manifest.json"):
        raise ValueError(f"--allocation {args.allocation} is of another scheme or of another model")
    facts = {name: allocation[name] for name in ("tokens", "seconds", "departures")}
    return {"sha256": sha256_file(args.allocation), **facts}


def _start(args: argparse.Namespace, allocated: dict | None, declared, config) -> dict:
    """What is recorded of the cell that this one starts from, and of those before it. ValueError if it does not fit.

    `seconds` and `training`: of that step what it took, with all before it, and what it trained on. `residuals_sha256`: of
    what it had before it rounded, if it left that.
    """
    run_file = args.init_from.parent / "run.json"
    if not run_file.is_file():
        raise ValueError(f"--init-from {args.init_from} is not the checkpoint of a cell: there is no {run_file}")
    run = read_json(run_file)
    quantizes = bool(run["scheme"])
    if quantizes and registry.CODES not in declared.of.takes:
        raise ValueError(f"method {args.method} cannot start from a checkpoint that is quantized already")
    if quantizes:
        config.require_defaults()
    if (quantizes and run["scheme"] != args.scheme) or run["model"] != read_json(args.model / "manifest.json"):
        raise ValueError(f"--init-from {args.init_from} has another scheme or another model than this cell")
    if quantizes and run["allocation"] != allocated:
        raise ValueError(f"--init-from {args.init_from} has another allocation of bits than this cell")
    before, tokens, residuals = run["init_from"], run["tokens"] or {}, args.init_from / RESIDUALS
    seconds = run["seconds"]["quantize"] + float(tokens.get("seconds", 0)) + (before["seconds"] if before else 0)
    training = run["training"] and {"tokens": run["training"]["tokens"], "dataset": tokens["dataset"]}
    return {
        "method": run["cell"]["method"],
        "module": run["module"],
        "quantizes": quantizes,
        "checkpoint_sha256": run["checkpoint_sha256"],
        "residuals_sha256": sha256_file(residuals) if residuals.is_file() else None,
        "seconds": seconds,
        "training": training,
        "init_from": before,
    }


def _quantized(start: dict | None) -> bool:
    return start is not None and start["quantizes"]


def _cell(args: argparse.Namespace) -> dict:
    return {"model": args.model.name, "scheme": "custom", "method": args.method, "seed": args.seed} | (args.cell or {})


def _layer_table(model, original: Path, names: list[str], log) -> list[dict]:
    """One row per linear layer of the blocks: its grid, the method's own facts, and the error of its weight relative to what
    was to be quantized, the model in the folder `original`."""
    from methods.core.model.checkpoint import stored_weights

    rows = []
    for name, weight in zip(names, stored_weights(original, names), strict=True):
        module, weight = model.get_submodule(name), weight.float()
        grid = getattr(module, "grid", None)
        change = module.weight.detach().float() - weight
        rows.append(
            {
                "layer": name,
                "shape": list(weight.shape),
                "bits": grid and grid.bits,
                "group_size": grid and grid.group_size,
                "symmetric": grid and grid.symmetric,
                "weight_error": float(change.norm() / weight.norm()),
                **log.layers.get(name, {}),
            }
        )
    return rows


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
        "--init-from", type=Path, metavar="CHECKPOINT", help="start from the checkpoint of another method's cell"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--log", help="path of the log file, to be named in failed.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cell")
    return parser


if __name__ == "__main__":
    main()
