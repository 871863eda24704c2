"""Predictions of a full-precision model on a text, from which the divergence of its quantized forms is measured.

python -m workflow.prepare.reference --model resources/models/micro --tokens resources/tokens/micro/squad.safetensors \
    --options '{window: 256, max_windows: 16}' --output resources/reference/micro/squad.safetensors
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from methods.core.job.files import exclusive
from methods.core.job.options import build_config, mapping


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the prepared full-precision model")
    parser.add_argument("--tokens", type=Path, required=True, help="tokenized text")
    parser.add_argument("--options", type=mapping, default={}, help="options of the divergence evaluation")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with exclusive(args.output):
        make(args)


def make(args: argparse.Namespace) -> None:
    """Predict, and write what evaluations compare with to `args.output`."""
    import torch

    from evals.core.reference import reference, write_reference
    from evals.divergence import Config, noise_floor
    from methods.core.job import runtime
    from methods.core.job.files import read_json
    from methods.core.job.log import RunLog
    from methods.core.model.checkpoint import load_model
    from methods.core.tokens import check_length, read_windows

    config = build_config(Config, args.options, "evaluation divergence")
    runtime.set_up(args.threads, seed=0)
    dtype = torch.float32 if config.dtype == "float32" else runtime.compute_dtype(args.model)
    model = load_model(args.model, dtype).to(runtime.device())
    check_length(model, config.window, "window")
    windows, info = read_windows(args.tokens, config.window)
    total, windows = len(windows), windows[: config.max_windows]
    tensors = reference(model, windows, RunLog()) | {"input_ids": windows.int()}
    info |= {"kl_floor": noise_floor(model, windows, tensors["states"])}
    info |= {
        "windows": total,
        "options": asdict(config),
        "model_sha256": read_json(args.model / "manifest.json")["sha256"],
    }
    info |= {"compute_dtype": runtime.dtype_name(dtype)}
    write_reference(args.output, tensors, info)


if __name__ == "__main__":
    main()
