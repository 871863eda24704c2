"""Cost of errors in each layer's weights to a model's predictions, at each number of bits that the layer may have.

python -m workflow.prepare.sensitivity --model resources/models/micro --weights '{choices: [2, 3, 4, 8], group_size: 64}' \
    --tokens resources/tokens/micro/calibration.safetensors --output results/try/sensitivity.json
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

from methods.core.job.files import announce, exclusive, read_json, write_json
from methods.core.job.options import mapping
from methods.core.scheme import Scheme


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.prepare.sensitivity", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared full-precision model")
    parser.add_argument(
        "--weights", type=mapping, required=True, help="as under a scheme's weights; average_bits does not matter"
    )
    parser.add_argument("--tokens", type=Path, required=True, help="tokenized calibration text")
    parser.add_argument("--samples", type=int, default=16, help="sequences of the text (default 16)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    announce()
    with exclusive(args.output):
        measure(args, parser)


def measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the sensitivities to `args.output`."""
    try:
        scheme = Scheme.from_dict("custom", {"weights": args.weights | {"average_bits": None}})
    except (TypeError, ValueError) as e:
        parser.error(f"--weights: {e}")
    if not scheme.weights.mixed:
        parser.error("--weights has bits, the same for all layers; sensitivities are for a scheme with choices")
    weights = scheme.weights
    manifest = read_json(args.model / "manifest.json")

    import torch

    from methods.core import sensitivity
    from methods.core.compensation import solve
    from methods.core.job import runtime
    from methods.core.job.log import RunLog
    from methods.core.job.options import CompensationOptions
    from methods.core.model.anatomy import block_linears
    from methods.core.model.checkpoint import load_model
    from methods.core.model.walk import find_stages
    from methods.core.tokens import check_length, sample_windows

    runtime.set_up(args.threads, seed=0)
    log, config = RunLog(), CompensationOptions()
    dtype = runtime.compute_dtype(args.model)
    if dtype == torch.float16 and weights.sensitivity == "fisher":
        dtype = torch.float32  # gradients of a loss over a large vocabulary underflow in fp16
    model = load_model(args.model, dtype).to(runtime.device())
    check_length(model, args.sequence_length, "sequence length")
    tokens, info = sample_windows(args.tokens, args.samples, args.sequence_length, seed=0)
    linears = block_linears(model)
    run = partial(model.base_model, use_cache=False)
    with torch.no_grad():
        stages = find_stages(run, model, tokens[:1, :8].to(model.device), tuple(linears))

    def rounding(weight, hessian, form):
        solution = solve(weight, hessian, form, config)
        if solution.damp > config.damp:
            log.departure(f"damping of a unit at {form.bits} bits raised from {config.damp:g} to {solution.damp:g}")
        return solution.rounded.value(torch.float32)

    estimator = getattr(sensitivity, weights.sensitivity)
    if weights.sensitivity == "kl":
        estimator = partial(estimator, rounding=rounding)
    with log.timer("sensitivity"):
        units = sensitivity.units_of(linears, stages, weights, log)
        distortion = estimator(model, units, tokens, weights, log)
    write_json(
        args.output,
        {
            "weights": {name: value for name, value in asdict(weights).items() if value is not None},
            "model": manifest,
            "tokens": info,
            "compute_dtype": runtime.dtype_name(dtype),
            "rounding": asdict(config) if weights.sensitivity == "kl" else None,  # GPTQ's, of one unit at a time
            "departures": log.departures,
            "seconds": round(log.seconds["sensitivity"], 2),
            "units": [asdict(unit) | {"distortion": d} for unit, d in zip(units, distortion, strict=True)],
            "provenance": runtime.provenance(),
        },
    )


if __name__ == "__main__":
    main()
