"""Bits of each layer of a model, for a scheme with average_bits: sensitivities, then the best choice within the budget.

python -m workflow.scripts.allocate --model resources/models/micro \
    --weights '{average_bits: 3.25, choices: [2, 3, 4, 8], group_size: 64}' \
    --tokens resources/tokens/micro/calibration.safetensors --output results/try/allocation.json
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from methods.core.files import announce, read_json, write_json
from methods.core.options import mapping
from methods.core.scheme import Scheme


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.scripts.allocate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared full-precision model")
    parser.add_argument("--weights", type=mapping, required=True, help="as under a scheme's weights")
    parser.add_argument("--tokens", type=Path, required=True, help="tokenized calibration text")
    parser.add_argument("--samples", type=int, default=16, help="sequences to estimate sensitivities on (default 16)")
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens per sequence (default 256)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    announce()
    scheme = Scheme.from_dict("custom", {"weights": args.weights})
    if not scheme.weights.mixed:
        parser.error("--weights has bits, the same for all layers; an allocation is for average_bits")

    import torch

    from methods import gptq
    from methods.core import runtime, sensitivity
    from methods.core.allocation import allocate, in_company, units_of
    from methods.core.calibration import find_stages
    from methods.core.checkpoint import load_model
    from methods.core.grid import dequantize
    from methods.core.log import RunLog
    from methods.core.modules import block_linears
    from methods.core.tokens import check_length, sample_windows

    runtime.set_up(args.threads, seed=0)
    log = RunLog()
    model = load_model(args.model, runtime.compute_dtype(args.model)).to(runtime.device())
    check_length(model, args.sequence_length, "sequence length")
    tokens, info = sample_windows(args.tokens, args.samples, args.sequence_length, seed=0)
    linears = block_linears(model)
    run = partial(model.base_model, use_cache=False)
    with torch.no_grad():
        stages = find_stages(run, model, tokens[:1, :8].to(model.device), tuple(linears))
    units = units_of(linears, stages, scheme.weights, log)
    if scheme.weights.sensitivity == "kl":
        config = gptq.Config()

        def rounding(weight, hessian, grid):
            return dequantize(*gptq.solve(weight, hessian, grid, config).tensors, torch.float32)

        distortion = sensitivity.kl(model, units, tokens, scheme, log, rounding)
    else:
        estimator = getattr(sensitivity, scheme.weights.sensitivity)
        distortion = estimator(model, units, tokens, scheme, log)

    average = scheme.weights.average_bits
    weighed = [in_company(d, unit, average) for d, unit in zip(distortion, units, strict=True)]
    weights = sum(unit.weights for unit in units)
    budget = int(average * weights)
    chosen = allocate([unit.stored for unit in units], weighed, budget)
    stored = sum(unit.stored[bits] for unit, bits in zip(units, chosen, strict=True))
    log.info(
        f"{stored / weights:.4f} bits per weight: "
        + ", ".join(f"{chosen.count(b)} units of {b}" for b in scheme.weights.widths)
    )
    write_json(
        args.output,
        {
            "weights": args.weights,
            "model": read_json(args.model / "manifest.json"),
            "tokens": info,
            "bits_per_weight": stored / weights,
            "distortion": sum(d[bits] for d, bits in zip(distortion, chosen, strict=True)),
            "layers": [
                {"layer": layer, "bits": bits, "distortion_of_unit": d}
                for unit, bits, d in zip(units, chosen, distortion, strict=True)
                for layer in unit.layers
            ],
            "provenance": runtime.provenance(),
        },
    )


if __name__ == "__main__":
    main()
