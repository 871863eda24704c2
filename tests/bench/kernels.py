"""PyTorch's low-bit operators alone: how fast they read packed weights, beside bf16's and the memory itself.

python -m tests.bench.kernels [batch]        (default 1)

The layers of the library's llama-1b-random. What a whole model makes of it is the report of workflow/config/hardware.yaml.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from evals.core.kernels import Int4Linear, Int8Linear
from evals.throughput import read_bandwidth
from methods.core.formats.integer import Integer
from methods.core.job import runtime
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))  # output and input features
COPIES = 8  # of each layer, in turns: more bytes than a cache holds


def milliseconds(functions: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Of one call, the median of 20 rounds over all of them."""
    rounds = []
    for _ in range(21):
        start = time.perf_counter()
        for function in functions:
            function(x)
        rounds.append(1e3 * (time.perf_counter() - start) / len(functions))
    return sorted(rounds[1:])[10]


def quantized(weight: Tensor, grid: Integer) -> QuantizedLinear:
    scale, zero_point = choose_scale(weight, grid, ScaleSearch())
    return QuantizedLinear(grid.quantize(weight, scale, zero_point), None, torch.bfloat16)


@torch.inference_mode()
def main() -> None:
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    runtime.set_up(None, 0)
    device = runtime.device()
    memory = read_bandwidth(device) / 1e9
    print(
        f"{runtime.processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores; memory is read at {memory:.0f} GB/s"
    )
    for out_features, in_features in SHAPES:
        x = torch.randn(batch, in_features, device=device, dtype=torch.bfloat16)
        weights = [torch.randn(out_features, in_features, device=device) for _ in range(COPIES)]
        layers = {
            "bf16": [partial(F.linear, weight=w.bfloat16()) for w in weights],
            "int8": [Int8Linear(quantized(w, Integer(8, None))) for w in weights],
            "int4": [Int4Linear(quantized(w, Integer(4, 64))) for w in weights],
        }
        count = weights[0].numel()
        size = {"bf16": 2 * count, "int8": count + 2 * out_features, "int4": count / 2 + 4 * count / 64}
        took = {name: milliseconds(functions, x) for name, functions in layers.items()}
        print(f"{out_features} x {in_features}, batch {batch}")
        for name, ms in took.items():
            rate = size[name] / ms / 1e6
            share = f"{rate:5.1f} GB/s, {100 * rate / memory:3.0f} % of memory's"
            print(f"  {name}  {ms:6.2f} ms  {took['bf16'] / ms:4.2f} x bf16  {share}")


if __name__ == "__main__":
    main()
