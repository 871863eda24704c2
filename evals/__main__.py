"""Evaluate one checkpoint: load it once per dtype, write a result file per evaluation and a Parquet file of its items.

python -m evals '{perplexity: {data: resources/tokens/micro/squad.safetensors, options: {window: 256}}, footprint: {}}' \
    --checkpoint results/try/checkpoint --output results/try/evals

The mapping is that of `evaluations:` in a configuration, with the path of the data (a list of folders for tasks) in place of
its name. `perplexity-c4` is `perplexity` once more, on another text, and so are its metrics called. An earlier result is kept
if its checkpoint, options, data, code and machine are the same: adding an evaluation runs only that one, and a run that was
killed continues with what is missing. If an evaluation fails, OUTPUT/<evaluation>.failed.json says why, the others still run,
and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from methods.core.job import registry
from methods.core.job.files import (
    announce,
    atomic_path,
    check_model,
    checkpoint_sha256,
    earlier_json,
    exclusive,
    read_json,
    sha256_file,
    sha256_folder,
    write_json,
)
from methods.core.job.options import build_config, choose, mapping
from methods.core.job.sources import code_sha256, version_of
from methods.core.scheme import format_files


@dataclass(frozen=True)
class Job:
    """One entry of the mapping, checked."""

    name: str
    module: str
    config: Any
    data: Path | list[Path] | None
    output: Path
    of: registry.Evaluation

    @property
    def suffix(self) -> str:
        """What tells its metrics from those of the same module on another text."""
        return self.name.removeprefix(self.module)

    def dtype(self, compute):
        """The torch dtype of this evaluation; `compute` is the one in which the machine computes the model."""
        import torch

        return torch.float32 if getattr(self.config, "dtype", "compute") == "float32" else compute

    def inputs(self, computes: str, formats: list[str]) -> dict[str, Any]:
        """What a result depends on besides the checkpoint.

        computes: dtype, device and libraries, and the machine if the evaluation depends on it. formats: the checkpoint's
        number formats.
        """
        paths = self.data if isinstance(self.data, list) else [self.data] if self.data else []
        return {
            "options": json.loads(json.dumps(asdict(self.config))),
            "data_sha256": [sha256_folder(p, ("**/task.json",)) if p.is_dir() else sha256_file(p) for p in paths],
            "code_sha256": code_sha256("evals/__main__.py", f"evals/{self.module}.py", *format_files(formats)),
            "computes": computes,
        }

    def remove_earlier(self) -> None:
        """Remove an outdated result and an earlier failure."""
        for suffix in (".json", ".parquet", ".failed.json"):
            self.output.with_suffix(suffix).unlink(missing_ok=True)

    def record_failure(self, error: Exception, log: str | None) -> None:
        """Write why there is no result."""
        record = {"evaluation": self.name, "error": f"{type(error).__name__}: {error}", "log": log}
        write_json(self.output.with_suffix(".failed.json"), record)


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    announce()
    try:
        jobs = [check(name, entry or {}, args.output) for name, entry in args.evaluations.items()]
    except ValueError as error:
        sys.exit(f"error: {error}")
    with exclusive(args.output):
        try:
            complete = run(jobs, args)
        except ValueError as error:
            sys.exit(f"error: {error}")
        if not complete:
            sys.exit(1)
        write_json(args.output / "done.json", sorted(args.evaluations))


def check(name: str, entry: dict[str, Any], output: Path) -> Job:
    """The job of one entry of the mapping. ValueError for a mistake in it, before anything is loaded."""
    module, declared = registry.declared_evaluation(name)
    for key in entry:
        choose(key, ("data", "options"), f"key of evaluation {name}")
    config = build_config(declared.Config, entry.get("options", {}), f"evaluation {name}")
    data = entry.get("data")
    if (data is None) != (declared.of.given == "none"):
        raise ValueError(f"evaluation {name} {'takes no data' if data else f'needs data: {declared.of.given}'}")
    paths = [Path(p) for p in (data if isinstance(data, list) else [data] if data else [])]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise ValueError(f"evaluation {name}: there is no {missing[0]}")
    given = paths if declared.of.given == "tasks" else paths[0] if paths else None
    return Job(name, module, config, given, output / f"{name}.json", declared.of)


def run(jobs: list[Job], args: argparse.Namespace) -> bool:
    """Run the jobs whose results are missing or outdated. False if one failed."""
    import torch
    import transformers

    from methods.core.job import runtime
    from methods.core.model.checkpoint import formats_of, load_model

    check_model(args.checkpoint)  # before a result is removed
    sha256, compute = checkpoint_sha256(args.checkpoint), runtime.compute_dtype(args.checkpoint)
    formats = formats_of(args.checkpoint)
    libraries = f"torch {torch.__version__}, transformers {transformers.__version__}, lm_eval {version('lm_eval')}"
    machine = f", {runtime.threads_of(args.threads)} threads, {runtime.processor()}"
    # The code is hashed before anything runs, so that an edit during the run does not count as the code of the result.
    inputs = {}
    for job in jobs:
        computes = f"{job.dtype(compute)}, {runtime.device().type}, {libraries}"
        computes += "".join(f", {package} {version_of(package)}" for package in job.of.packages)
        inputs[job.name] = job.inputs(computes + (machine if job.of.machine_dependent else ""), formats)
    pending = [job for job in jobs if not _is_current(job, sha256, inputs[job.name])]
    for job in pending:
        job.remove_earlier()
    if kept := [job.name for job in jobs if job not in pending]:
        print(f"kept, nothing they depend on has changed: {', '.join(kept)}", file=sys.stderr)
    if not pending:
        return True

    runtime.set_up(args.threads, seed=0)
    complete, model = True, None
    for job in sorted(pending, key=lambda job: job.dtype(compute) != compute):
        dtype = job.dtype(compute)
        try:
            if model is None or model.dtype != dtype:
                model = None  # free it first: two models may not fit into memory
                runtime.release_freed_memory()
                model = load_model(args.checkpoint, dtype).to(runtime.device())
            _evaluate(job, inputs[job.name], model, sha256, args.checkpoint)
        except Exception as error:
            traceback.print_exc()
            job.record_failure(error, args.log)
            complete = False
    return complete


def _is_current(job: Job, sha256: str, inputs: dict[str, Any]) -> bool:
    """Whether the job's output has a result, of this checkpoint and of these inputs, and the items that it was made of."""
    result, items = earlier_json(job.output), job.output.with_suffix(".parquet")
    there = sha256_file(items) if items.is_file() else None
    return (
        result.get("checkpoint_sha256") == sha256
        and {k: result.get(k) for k in inputs} == inputs
        and result.get("items_sha256") == there
    )


def _evaluate(job: Job, inputs: dict[str, Any], model, sha256: str, checkpoint: Path) -> None:
    """Evaluate the model of a checkpoint and write the result, per-item values first."""
    import pandas as pd

    from methods.core.job import runtime
    from methods.core.job.log import RunLog

    run_file = checkpoint.parent / "run.json"
    log = RunLog()
    module = registry.load("evals", job.module)
    start = time.perf_counter()
    result = module.evaluate(model, checkpoint, job.config, job.data, log)
    seconds = time.perf_counter() - start
    items = job.output.with_suffix(".parquet")
    if result.items:
        with atomic_path(items) as temporary:
            pd.DataFrame(result.items).to_parquet(temporary, compression="zstd", index=False)
    write_json(
        job.output,
        {
            "cell": read_json(run_file)["cell"] if run_file.is_file() else None,
            "evaluation": job.name,
            "protocol": result.protocol,
            **inputs,
            "metrics": {name + job.suffix: metric for name, metric in result.metrics.items()},
            "items_sha256": sha256_file(items) if result.items else None,
            "data": result.data,
            "n": result.n,
            "partial": result.partial,
            "departures": log.departures,
            "checkpoint_sha256": sha256,
            "seconds": round(seconds, 2),
            "peak_memory_mb": runtime.peak_memory_mb(),
            "compute_dtype": runtime.dtype_name(model.dtype),
            "provenance": runtime.provenance(),
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evals", description=__doc__.splitlines()[0])
    names = ", ".join(registry.names("evals"))
    parser.add_argument(
        "evaluations",
        type=mapping,
        help=f"YAML or JSON mapping of evaluation to its data and options; there are {names}",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that from_pretrained loads")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--log", help="path of the log file, which the record of a failure names")
    parser.add_argument("--output", type=Path, required=True, help="folder of the result files")
    return parser


if __name__ == "__main__":
    main()
