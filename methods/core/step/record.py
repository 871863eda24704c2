"""What run.json says: of a step, of the whole chain up to it, and of each layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from methods.core import recipe
from methods.core.job.files import checkpoint_sha256, residuals_sha256
from methods.core.job.log import RunLog
from methods.core.job.runtime import peak_memory_mb, provenance
from methods.core.model.checkpoint import stored_weights
from methods.core.step.plan import Plan, cell_of


def step_record(
    plan: Plan,
    tokens_info: dict[str, Any] | None,
    log: RunLog,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What run.json records of this step."""
    args = plan.args
    return {
        "method": cell_of(args)["method"],
        "module": args.method,
        "kind": plan.method.kind,
        "options": asdict(plan.config),
        "tokens": tokens_info,
        "training": log.training and log.training | {"gradient_checkpointing": args.gradient_checkpointing},
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_mb": peak_memory_mb(),
        "checkpoint_sha256": checkpoint_sha256(args.output / "checkpoint"),
        "residuals_sha256": residuals_sha256(args.output / "checkpoint"),
    }


def run_record(
    plan: Plan, step: dict[str, Any], layers: list[dict[str, Any]], dtype: str, log: RunLog
) -> dict[str, Any]:
    """The whole of run.json: the cell, all steps up to this one, and what the chain comes to."""
    steps = [*(plan.before["steps"] if plan.before else []), step]
    return {
        "cell": cell_of(plan.args),
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


def layer_table(model: nn.Module, original: Path, names: list[str], log: RunLog) -> list[dict[str, Any]]:
    """One row per linear layer of the blocks: its format, the method's own facts, and the error of its weight relative to
    the weights in the folder `original`."""
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
                "weight_error": float(change.norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny)),
                **log.layers.get(name, {}),
            }
        )
    return rows
