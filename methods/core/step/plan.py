"""What one step of a recipe is to do, checked before torch is imported: a mistake is refused at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core import recipe
from methods.core.job import ranks, registry
from methods.core.job.files import RESIDUALS, read_json, residuals_sha256, sha256_file
from methods.core.job.options import build_config, choose
from methods.core.scheme import Scheme


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


def cell_of(args: argparse.Namespace) -> dict[str, Any]:
    """The names of model, scheme and method in results, the seed, and the budget that the workflow gives."""
    cell = {"model": args.model.name, "scheme": "custom", "method": args.method, "seed": args.seed, "budget": None}
    return cell | (args.cell or {})


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
    scheme = Scheme.from_dict(cell_of(args)["scheme"], args.scheme, bits)
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
    if ranks.count() > 1:
        _check_ranks(args, method)
    if scheme.weights and scheme.weights.mixed != bool(allocation):
        raise ValueError("--allocation FILE belongs to a scheme with average_bits, and to no other")
    allocated = _allocated(args, model, allocation, scheme) if allocation else None
    if scheme.weights and not method.needs_scheme and not args.init_from:
        raise ValueError(f"method {args.method} leaves the weights as they are: it has no --scheme with weights")
    before = _before(args, model, method, config, allocated) if args.init_from else None
    residuals = residuals_sha256(args.init_from) if args.init_from else None
    if residuals is not None and residuals != before["steps"][-1]["residuals_sha256"]:
        raise ValueError(
            f"{args.init_from / RESIDUALS} has been changed or damaged: its hash is not that in run.json. Without it, the "
            "step starts from the codes"
        )
    plan = Plan(args, method, config, model, scheme, allocated, before, residuals)
    if not (plan.weights / "config.json").is_file():
        raise ValueError(
            f"--init-from {args.init_from} was rounded from {plan.weights}, which is not there any more: make it again"
        )
    return plan


def _check_ranks(args: argparse.Namespace, method: registry.Method) -> None:
    """ValueError if the processes of this job cannot share the method's tokens."""
    if not method.divides:
        every = [name for name in registry.names("methods") if registry.declaration("methods", name).of.divides]
        raise ValueError(f"method {args.method} works in one process; torchrun is for {', '.join(every)}")
    amount, shared = {"samples": args.samples}, f"{args.samples} samples"
    if method.trains:
        amount |= {"accumulation": args.accumulation, "batch_size": args.batch_size}
        shared = f"steps of {args.accumulation} x {args.batch_size} sequences"
    if not ranks.equal_shares(amount, ranks.count()):
        raise ValueError(f"{ranks.count()} processes cannot share {shared} equally")


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
    run = read_json(run_file, sealed=True)
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
