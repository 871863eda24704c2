"""GPTQ on SmolLM2-135M: where the time goes, and how near it is to what the machine's matrix products allow.

python -m tests.bench.gptq [samples] [sequence length]        (default 64 512; needs a prepared model and tokens)
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

from methods.core.job import registry, runtime
from methods.core.job.log import RunLog
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model
from methods.core.scheme import Scheme
from methods.core.tokens import sample_windows
from tests.bench.table import Row, record

MODEL = Path("resources/models/smollm2-135m")
TOKENS = Path("resources/tokens/smollm2-135m/calibration.safetensors")


def peak_flops(dtype: torch.dtype) -> float:
    """Floating-point operations per second of the model's largest matrix product, the best of ten."""
    a, b = torch.randn(2048, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * a.numel() * b.shape[0] / best


def main() -> None:
    samples, length = (int(a) for a in (sys.argv[1:] or ["64", "512"]))
    if not (MODEL.exists() and TOKENS.exists()):
        sys.exit(f"error: prepare them first: snakemake --cores 8 {MODEL} {TOKENS}")
    runtime.set_up(None, 0)
    dtype = runtime.compute_dtype(MODEL)
    model = load_model(MODEL, dtype)
    linears = block_linears(model).values()
    weights = sum(m.weight.numel() for m in linears)
    stages = ("q_proj", "o_proj", "up_proj", "down_proj")
    widths = [m.in_features for name, m in block_linears(model).items() if name.endswith(stages)]
    tokens, _ = sample_windows(TOKENS, samples, length, seed=0)
    module, log = registry.load("methods", "gptq"), RunLog()
    start = time.perf_counter()
    module.apply(
        model, Scheme.from_dict("w4-g64", {"weights": {"bits": 4, "group_size": 64}}), module.Config(), tokens, log
    )
    total = time.perf_counter() - start

    # One forward pass (attention's own products left out), and H = X^T X of each stage, of which half is needed.
    needed = tokens.numel() * (2 * weights / peak_flops(dtype) + sum(w * w for w in widths) / peak_flops(torch.float32))
    machine = f"{torch.get_num_threads()} of {os.cpu_count()} cores, {dtype}"
    print(f"GPTQ, SmolLM2-135M, w4-g64, {samples} x {length} tokens, {machine}")
    print(f"total {total:.0f} s")
    for name, seconds in log.seconds.items():
        print(f"  {name:20} {seconds:6.1f} s  {seconds / total:4.0%}")
    limit = "a forward pass and half of each Hessian at this machine's peak"
    record([Row(f"GPTQ of SmolLM2-135M, {samples} x {length} tokens", total, needed, limit)])


if __name__ == "__main__":
    main()
