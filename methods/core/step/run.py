"""Doing a planned step: load what it starts from, apply its method, write OUTPUT/checkpoint and OUTPUT/run.json."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from methods.core.job import ranks, registry, runtime
from methods.core.job.files import atomic_path, check_model, keep_or_clear, write_json
from methods.core.job.log import RunLog
from methods.core.job.sources import code_sha256
from methods.core.model.activations import carries_tokens, mark_layers
from methods.core.model.anatomy import block_linears, checkpoint_blocks, unquantizable_parameters
from methods.core.model.checkpoint import load_model, load_residuals, save_checkpoint, stored_weights
from methods.core.scheme import format_files
from methods.core.step.plan import Plan, cell_of
from methods.core.step.record import layer_table, run_record, step_record
from methods.core.tokens import check_length, sample_windows


def run(plan: Plan) -> None:
    """Apply the step; write OUTPUT/checkpoint and OUTPUT/run.json. Raises the method's own errors."""
    args, method = plan.args, plan.method
    runtime.set_up(args.threads, args.seed)
    dtype = _compute_dtype(plan)
    tokens, tokens_info = _tokens(plan)
    log = RunLog(args.output / "training")
    # What was killed goes on only with the very same settings and code.
    computes = f"{dtype}, {runtime.device().type}, torch {torch.__version__}"
    if ranks.leads():
        keep_or_clear(log.folder, _settings(plan, tokens_info, computes))
    ranks.wait()

    started = time.perf_counter()
    model = _load(plan, dtype, log)
    if tokens is not None:
        check_length(model, args.sequence_length, "sequence length")
    names = list(block_linears(model))
    if method.kind != "transform":
        next(stored_weights(plan.weights, names[-1:]))  # an error now, rather than when run.json is written
    log.info(f"{args.method}: {len(names)} linear layers of {plan.source}, scheme {plan.scheme.name}")
    model = _apply(plan, model, names, tokens, log)
    if not ranks.leads():
        return
    with atomic_path(args.output / "checkpoint") as folder, log.timer("save"):
        stored = torch.float32 if method.kind == "transform" else None  # rounded to 16 bits it is another function
        save_checkpoint(model, args.model, folder, stored)

    seconds = {"total": time.perf_counter() - started, **log.seconds}
    for name in ("total", "apply"):
        seconds[name] += log.earlier_seconds
    # A transform changes the weights and not the function: their difference is no error.
    layers = [] if method.kind == "transform" else layer_table(model, plan.weights, names, log)
    step = step_record(plan, tokens_info, log, seconds)
    write_json(args.output / "run.json", run_record(plan, step, layers, runtime.dtype_name(dtype), log))
    # Last: until run.json is there it can be resumed.
    (log.folder / "state.safetensors").unlink(missing_ok=True)
    shutil.rmtree(log.folder / "blocks", ignore_errors=True)


def _compute_dtype(plan: Plan) -> torch.dtype:
    """The dtype that the step computes in, on this machine."""
    method, dtype = plan.method, runtime.compute_dtype(plan.args.model)
    if method.kind == "transform" or (plan.transformed and not method.trains):
        return torch.float32  # transformed weights are exact in fp32 only; what is rounded should be they
    if (method.trains or method.differentiates) and dtype == torch.float16:
        return torch.float32  # gradients of a mean over a large vocabulary, or over many outputs, underflow in fp16
    return dtype


def _tokens(plan: Plan) -> tuple[Tensor | None, dict[str, Any] | None]:
    """The tokens that the method receives, in their shape, and what is recorded of them."""
    args = plan.args
    if plan.method.reads == "none":
        return None, None
    tokens, info = sample_windows(args.tokens, args.samples, args.sequence_length, args.seed)
    if plan.method.trains:
        tokens = tokens.unflatten(0, (-1, args.accumulation, args.batch_size))
        info |= {"batch_size": args.batch_size, "accumulation": args.accumulation}
        return tokens, info
    return ranks.share(tokens), info


def _settings(plan: Plan, tokens_info: dict[str, Any] | None, computes: str) -> dict[str, Any]:
    """All that a training depends on."""
    args = plan.args
    return {
        "cell": cell_of(args),
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


def _load(plan: Plan, dtype: torch.dtype, log: RunLog) -> nn.Module:
    """The model that the step is applied to; the log gets its departures. ValueError if its weights are not finite."""
    with log.timer("load"):
        model = load_model(plan.source, dtype)
        if plan.before:
            load_residuals(model, plan.source)
        if plan.weights != plan.source:
            check_model(plan.weights)  # what errors are relative to
    if plan.before and plan.residuals_sha256 != plan.before["steps"][-1]["residuals_sha256"]:
        log.departure(f"{plan.source}: the residuals of the rounding, which its run.json records, are not there")
    if plan.transformed and plan.allocation:
        log.departure("the bits were allocated by sensitivities of the model as it was before the transform")
    if plan.method.quantizes and (left := unquantizable_parameters(model)):
        log.departure(f"no linear layers, or routers, stay in full precision: {', '.join(left)}")
    if broken := [name for name, linear in block_linears(model).items() if not linear.weight.isfinite().all()]:
        raise ValueError(f"{plan.source}: weights that are not finite in {', '.join(broken)}")
    mark_layers(model, plan.scheme)
    return model


def _apply(plan: Plan, model: nn.Module, names: list[str], tokens: Tensor | None, log: RunLog) -> nn.Module:
    """What the method makes of the model, on the CPU. RuntimeError if it left out one of the layers of these names."""
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
