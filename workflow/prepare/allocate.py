"""Bits of each layer of a model: the allocation within a budget of stored bits that costs its predictions least.

python -m workflow.prepare.allocate --sensitivity results/try/sensitivity.json --average-bits 3.25 \
    --output results/try/allocation.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from methods.core.allocation import INTERACTION_PENALTY, allocate, with_interaction
from methods.core.job.files import announce, read_json, sha256_file, write_json


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workflow.prepare.allocate", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sensitivity", type=Path, required=True, help="file of python -m workflow.prepare.sensitivity"
    )
    parser.add_argument(
        "--average-bits", type=float, required=True, help="most bits stored per weight, scales included"
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    announce()
    sensitivity = read_json(args.sensitivity)
    units = sensitivity["units"]
    stored, distortion = [[_by_bits(unit[kind]) for unit in units] for kind in ("stored", "distortion")]
    weights = [unit["weights"] for unit in units]
    average = args.average_bits
    weighed = [with_interaction(*unit, average) for unit in zip(distortion, stored, weights, strict=True)]
    try:
        chosen = allocate(stored, weighed, int(average * sum(weights)))
    except ValueError as e:
        parser.error(f"--average-bits {average:g} with {args.sensitivity}: {e}")
    taken = sum(s[bits] for s, bits in zip(stored, chosen, strict=True)) / sum(weights)
    counts = ", ".join(f"{chosen.count(bits)} units of {bits}" for bits in stored[0])
    print(f"{taken:.4f} bits per weight: {counts}", flush=True)
    write_json(
        args.output,
        {
            "weights": sensitivity["weights"] | {"average_bits": average},
            "sensitivity_sha256": sha256_file(args.sensitivity),
            **{
                name: sensitivity[name]
                for name in ("model", "tokens", "compute_dtype", "departures", "seconds", "provenance")
            },
            "bits_per_weight": taken,
            "interaction_penalty": INTERACTION_PENALTY,
            "distortion": sum(d[bits] for d, bits in zip(distortion, chosen, strict=True)),
            "minimized": sum(d[bits] for d, bits in zip(weighed, chosen, strict=True)),
            "layers": [
                {"layer": layer, "bits": bits, "distortion_of_unit": d}
                for unit, bits, d in zip(units, chosen, distortion, strict=True)
                for layer in unit["layers"]
            ],
        },
    )


def _by_bits(values: dict[str, float]) -> dict[int, float]:
    """The same values with numbers as keys, which are text in JSON."""
    return {int(bits): value for bits, value in values.items()}


if __name__ == "__main__":
    main()
