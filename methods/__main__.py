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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from methods.core import recipe
from methods.core.job import registry
from methods.core.job.files import (
    announce,
    atomic_path,
    keep_or_clear,
    read_json,
    residuals_sha256,
    sha256_file,
    write_json,
)
from methods.core.job.options import build_config, choose, mapping
from methods.core.job.sources import code_sha256
from methods.core.scheme import Scheme, format_files


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    announce()
    failed = args.output / "failed.json"
    failed.unlink(missing_ok=True)
    try:
        run(check(args))
    except Exception as error:
        traceback.print_exc()
        write_json(failed, {"cell": _cell(args), "error": f"{type(error).__name__}: {error}", "log": args.log})
        sys.exit(1)


@dataclass(frozen=True)
class Plan:
    """A step that has been checked."""

    args: argparse.Namespace
    method: registry.Method
    config: Any
    model: dict[str, Any]  # manifest.json of the full-precision model
    scheme: Scheme
    allocation: dict[str, Any] | None  # what is recorded of the file that gives each layer its bits
    before: dict[str, Any] | None  # run.json of the step before
    residuals_sha256: str | None  # of what the step before had before it rounded, where that is

    @property
    def source(self) -> Path:
        """The folder of the model that the step is applied to."""
        return self.args.init_from or self.args.model

    @property
    def weights(self) -> Path:
        """The folder of the weights that are rounded, or that codes were rounded from."""
        return Path(self.before["weights"]) if self.starts_quantized else self.source

    @property
    def starts_quantized(self) -> bool:
        """Whether the step starts from codes."""
        return self.before is not None and recipe.quantized(self.before["chain"]["kinds"])

    @property
    def needs_teacher(self) -> bool:
        """Whether the full-precision model is needed and is not the one that the step is applied to."""
        return self.method.distills and self.starts_quantized

    @property
    def transformed(self) -> bool:
        """Whether an earlier step has changed the weights without the function."""
        return self.before is not None and "transform" in self.before["chain"]["kinds"]


def check(args: argparse.Namespace) -> Plan:
    """ValueError for options, schemes, tokens or an earlier step that do not fit; torch is not imported before."""
    choose(args.method, registry.names("methods"), "method")
    declared = registry.declaration("methods", args.method)
    method = declared.of
    config = build_config(declared.Config, args.options, f"method {args.method}")
    if not (args.model / "manifest.json").is_file():
        raise ValueError(
            f"{args.model} is not a prepared model; python -m workflow.prepare.model makes one of any model"
        )
    model = read_json(args.model / "manifest.json")
    allocation = _read_allocation(args.allocation) if args.allocation else None
    bits = {row["layer"]: row["bits"] for row in allocation["layers"]} if allocation else None
    scheme = Scheme.from_dict(_cell(args)["scheme"], args.scheme, bits)
    if method.needs_scheme and scheme.weights is None:
        raise ValueError(
            f"method {args.method} needs a scheme with weights, such as --scheme '{{weights: {{bits: 4}}}}'"
        )
    if declared.check:
        declared.check(scheme, config)
    if method.reads != "none" and args.tokens is None:
        raise ValueError(f"method {args.method} needs {method.reads} tokens: --tokens FILE")
    if method.trains and args.samples % (args.accumulation * args.batch_size):
        raise ValueError(f"{args.samples} samples are not whole steps of {args.accumulation} x {args.batch_size}")
    if scheme.weights and scheme.weights.mixed != bool(allocation):
        raise ValueError("--allocation FILE belongs to a scheme with average_bits, and to no other")
    allocated = _allocated(args, model, allocation, scheme) if allocation else None
    if scheme.weights and not method.needs_scheme and not args.init_from:
        raise ValueError(f"method {args.method} leaves the weights as they are: it has no --scheme with weights")
    before = _before(args, model, method, config, allocated) if args.init_from else None
    residuals = residuals_sha256(args.init_from) if args.init_from else None
    plan = Plan(args, method, config, model, scheme, allocated, before, residuals)
    if not (plan.weights / "config.json").is_file():
        raise ValueError(
            f"--init-from {args.init_from} was rounded from {plan.weights}, which is not there any more: make it again"
        )
    return plan


def _read_allocation(path: Path) -> dict:
    """ValueError if the file is not one of workflow/prepare/allocate.py."""
    allocation = read_json(path)
    if not isinstance(allocation, dict) or not {"weights", "layers"} <= allocation.keys():
        raise ValueError(f"--allocation {path} is not a file of python -m workflow.prepare.allocate")
    return allocation


def _allocated(args: argparse.Namespace, model: dict, allocation: dict, scheme: Scheme) -> dict:
    """What is recorded of the file that gives each layer its bits. ValueError for the file of another scheme or model."""
    weights = Scheme.from_dict("", {"weights": allocation["weights"]}).weights
    if weights != scheme.weights or allocation["model"] != model:
        raise ValueError(f"--allocation {args.allocation} has another scheme or another model")
    facts = {name: allocation[name] for name in ("tokens", "seconds", "departures")}
    return {"sha256": sha256_file(args.allocation), **facts}


def _before(
    args: argparse.Namespace, model: dict, method: registry.Method, config: Any, allocated: dict | None
) -> dict:
    """`run.json` of the checkpoint that the step starts from. ValueError if it does not fit."""
    run_file = args.init_from.parent / "run.json"
    if not run_file.is_file():
        raise ValueError(f"--init-from {args.init_from} is not the checkpoint of a cell: there is no {run_file}")
    run = read_json(run_file)
    if "steps" not in run:
        raise ValueError(f"--init-from {args.init_from} was made by an older version: make it again")
    steps = [(step["module"], registry.declaration("methods", step["module"]).of) for step in run["steps"]]
    recipe.check_chain([*steps, (args.method, method)])
    if (run["scheme"] and run["scheme"] != args.scheme) or run["model"] != model:
        raise ValueError(f"--init-from {args.init_from} has another scheme or another model than this cell")
    if run["scheme"] and run["allocation"] != allocated:
        raise ValueError(f"--init-from {args.init_from} has another allocation of bits than this cell")
    if recipe.quantized(run["chain"]["kinds"]) and hasattr(config, "require_defaults"):
        config.require_defaults()
    return run


def run(plan: Plan) -> None:
    """Apply the step; write OUTPUT/checkpoint and OUTPUT/run.json. Raises the method's own errors."""
    import torch

    from methods.core.job import runtime
    from methods.core.job.log import RunLog
    from methods.core.model.anatomy import block_linears
    from methods.core.model.checkpoint import save_checkpoint
    from methods.core.tokens import check_length

    args, method = plan.args, plan.method
    runtime.set_up(args.threads, args.seed)
    dtype = _compute_dtype(plan)
    tokens, tokens_info = _tokens(plan)
    log = RunLog(args.output / "training")
    if method.trains:
        # A training resumes only what was started with the very same settings and code.
        computes = f"{dtype}, {runtime.device().type}, torch {torch.__version__}"
        keep_or_clear(log.folder, _settings(plan, tokens_info, computes))

    started = time.perf_counter()
    model = _load(plan, dtype, log)
    if tokens is not None:
        check_length(model, args.sequence_length, "sequence length")
    names = list(block_linears(model))
    log.info(f"{args.method}: {len(names)} linear layers of {plan.source}, scheme {plan.scheme.name}")
    model = _apply(plan, model, names, tokens, log)
    peak_memory_mb = runtime.peak_memory_mb()
    with atomic_path(args.output / "checkpoint") as folder, log.timer("save"):
        stored = torch.float32 if method.kind == "transform" else None  # rounded to 16 bits it is another function
        save_checkpoint(model, args.model, folder, stored)

    seconds = {"total": time.perf_counter() - started, **log.seconds}
    for name in ("total", "apply"):
        seconds[name] += log.earlier_seconds
    step = _step(plan, tokens_info, log, seconds, peak_memory_mb)
    # A transform changes the weights and not the function: their difference is no error.
    layers = [] if method.kind == "transform" else _layer_table(model, plan.weights, names, log)
    write_json(args.output / "run.json", _record(plan, step, layers, runtime.dtype_name(dtype), log))
    (log.folder / "state.safetensors").unlink(missing_ok=True)  # last: until run.json is there it can be resumed


def _compute_dtype(plan: Plan):
    """The dtype that the step computes in, on this machine."""
    import torch

    from methods.core.job.runtime import compute_dtype

    method, dtype = plan.method, compute_dtype(plan.args.model)
    if method.kind == "transform" or (plan.transformed and not method.trains):
        return torch.float32  # transformed weights are exact in fp32 only; what is rounded should be they
    if (method.trains or method.differentiates) and dtype == torch.float16:
        return torch.float32  # gradients of a mean over a large vocabulary, or over many outputs, underflow in fp16
    return dtype


def _load(plan: Plan, dtype, log):
    """The model that the step is applied to; the log gets its departures. ValueError if its weights are not finite."""
    from methods.core.model.activations import mark_layers
    from methods.core.model.anatomy import block_linears, unquantizable_parameters
    from methods.core.model.checkpoint import load_model, load_residuals

    with log.timer("load"):
        model = load_model(plan.source, dtype)
        if plan.before:
            load_residuals(model, plan.source)
    if plan.before and plan.residuals_sha256 != plan.before["steps"][-1]["residuals_sha256"]:
        log.departure(f"{plan.source}: the residuals of the rounding are not those that its run.json records")
    if plan.transformed and plan.allocation:
        log.departure("the bits were allocated by sensitivities of the model as it was before the transform")
    if plan.method.quantizes and (left := unquantizable_parameters(model)):
        log.departure(f"not linear layers, stay in full precision: {', '.join(left)}")
    if broken := [name for name, linear in block_linears(model).items() if not linear.weight.isfinite().all()]:
        raise ValueError(f"{plan.source}: weights that are not finite in {', '.join(broken)}")
    mark_layers(model, plan.scheme)
    return model


def _apply(plan: Plan, model, names: list[str], tokens, log):
    """What the method makes of the model, on the CPU. RuntimeError if it left out one of the layers of these names."""
    from methods.core.model.activations import carries_tokens
    from methods.core.model.anatomy import checkpoint_blocks
    from methods.core.model.checkpoint import load_model

    method = plan.args.method
    with log.timer("apply"):
        if plan.args.gradient_checkpointing:
            checkpoint_blocks(model)
        given = {"teacher": lambda: load_model(plan.weights, model.dtype)} if plan.needs_teacher else {}
        model = registry.load("methods", method).apply(model, plan.scheme, plan.config, tokens, log, **given).cpu()
    if plan.method.quantizes and (left := [n for n in names if not hasattr(model.get_submodule(n), "format")]):
        raise RuntimeError(f"{method} left layers in full precision: {', '.join(left)}")
    if lost := [n for n in names if not carries_tokens(model, n, plan.scheme)]:
        raise RuntimeError(f"{method} lost the token quantization of {', '.join(lost)}")
    return model


def _step(plan: Plan, tokens_info: dict | None, log, seconds: dict[str, float], peak_memory_mb: dict) -> dict[str, Any]:
    """What run.json records of this step."""
    from methods.core.model.checkpoint import checkpoint_sha256

    args = plan.args
    return {
        "method": _cell(args)["method"],
        "module": args.method,
        "kind": plan.method.kind,
        "options": asdict(plan.config),
        "tokens": tokens_info,
        "training": log.training and log.training | {"gradient_checkpointing": args.gradient_checkpointing},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_mb": peak_memory_mb,
        "checkpoint_sha256": checkpoint_sha256(args.output / "checkpoint"),
        "residuals_sha256": residuals_sha256(args.output / "checkpoint"),
    }


def _record(plan: Plan, step: dict[str, Any], layers: list[dict], dtype: str, log) -> dict[str, Any]:
    """The whole of run.json: the cell, all steps up to this one, and what the chain comes to."""
    from methods.core.job.runtime import provenance

    steps = [*(plan.before["steps"] if plan.before else []), step]
    return {
        "cell": _cell(plan.args),
        "scheme": plan.args.scheme,
        "allocation": plan.allocation,
        "model": plan.model,
        "weights": str(plan.weights),
        "steps": steps,
        "chain": recipe.chain(steps, plan.allocation),
        "checkpoint_sha256": step["checkpoint_sha256"],
        "departures": [*(plan.before["departures"] if plan.before else []), *log.departures],
        "layers": layers,
        "compute_dtype": dtype,
        "provenance": provenance(),
    }


def _tokens(plan: Plan):
    """The tokens that the method receives, in their shape, and what is recorded of them."""
    from methods.core.tokens import sample_windows

    args = plan.args
    if plan.method.reads == "none":
        return None, None
    tokens, info = sample_windows(args.tokens, args.samples, args.sequence_length, args.seed)
    if plan.method.trains:
        tokens = tokens.unflatten(0, (-1, args.accumulation, args.batch_size))
        info |= {"batch_size": args.batch_size, "accumulation": args.accumulation}
    return tokens, info


def _settings(plan: Plan, tokens_info: dict | None, computes: str) -> dict[str, Any]:
    """All that a training depends on."""
    args = plan.args
    return {
        "cell": _cell(args),
        "scheme": args.scheme,
        "allocation": plan.allocation,
        "options": asdict(plan.config),
        "tokens": tokens_info,
        "model": plan.model,
        "starts_from": plan.before and [step["checkpoint_sha256"] for step in plan.before["steps"]],
        "residuals_sha256": plan.residuals_sha256,
        "computes": computes,
        "code_sha256": code_sha256(
            "methods/__main__.py", f"methods/{args.method}.py", *format_files(plan.scheme.formats)
        ),
    }


def _cell(args: argparse.Namespace) -> dict:
    return {"model": args.model.name, "scheme": "custom", "method": args.method, "seed": args.seed} | (args.cell or {})


def _layer_table(model, original: Path, names: list[str], log) -> list[dict]:
    """One row per linear layer of the blocks: its format, the method's own facts, and the error of its weight relative to
    the weights in the folder `original`."""
    from methods.core.model.checkpoint import stored_weights

    rows = []
    for name, weight in zip(names, stored_weights(original, names), strict=True):
        module, weight = model.get_submodule(name), weight.float()
        form = getattr(module, "format", None)
        change = module.weight.detach().float() - weight
        rows.append(
            {
                "layer": name,
                "shape": list(weight.shape),
                "format": form and form.name,
                "bits": form and form.bits,
                "group_size": form and form.group_size,
                "symmetric": form and form.symmetric,
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
        "--init-from", type=Path, metavar="CHECKPOINT", help="start from the checkpoint that an earlier step left"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--log", help="path of the log file, to be named in failed.json")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cell")
    return parser


if __name__ == "__main__":
    main()
