"""How the seconds of each stage grow with width, depth, tokens and cells: slopes in log-log, beside those of its operations.

python -m tests.bench.growth        (about ten minutes; random models, generated results, nothing to prepare)

A slope is of a least-squares line through all sizes: medians of ROUNDS for models, single runs for cells. What a stage takes
at its start makes it less steep, a cache that is left steeper.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import altair as alt
import torch
import vl_convert
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evals.perplexity import token_nll
from methods import gptq, lr_qat
from methods.core.job import runtime
from methods.core.job.log import RunLog, synchronize
from methods.core.training.layers import insert, quantized_by
from methods.core.training.losses import next_token_loss
from tests.bench.memory import SCHEME
from tests.bench.report import building
from tests.bench.startup import planning
from tests.bench.table import FOLDER, Growth, record

BASE = {"width": 256, "depth": 4, "tokens": 4096}
SIZES = {"width": (256, 512, 1024), "depth": (2, 4, 8, 16), "tokens": (2048, 4096, 8192, 16384)}
CELLS = {"report": (60, 125, 250, 500), "planning": (504, 1000, 2000, 4000)}
SEQUENCE, VOCABULARY, ROUNDS = 256, 1024, 3


def model_of(width: int, depth: int) -> nn.Module:
    """A Llama of random weights, whose head is small beside its blocks."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        max_position_embeddings=SEQUENCE,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(runtime.device()).requires_grad_(False)


def quantizing(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    return lambda: gptq.apply(model, SCHEME, gptq.Config(), tokens, RunLog())


def training(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    insert(model, quantized_by(SCHEME, lambda linear, grid: lr_qat.LowRank(linear, grid, lr_qat.Config())))
    return lambda: next_token_loss(model, tokens).backward()


def evaluating(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    return lambda: token_nll(model, tokens, 1, RunLog())


def shares(width: int, depth: int, tokens: int) -> dict[str, float]:
    """Operations of the parts of a stage: the products of all layers with all tokens, of a head, of attention's scores and
    values, and what GPTQ does with the Hessians of a block's four kinds of inputs."""
    inputs, weights = (width, width, width, 3 * width), 13 * width**2
    hessians = sum(2 * tokens * size**2 + 4 / 3 * size**3 for size in inputs)
    updates = 4 * width**3 + 6 * width**3 + 9 * width**3  # each column of a layer changes those after it
    return {
        "layers": 2 * tokens * depth * weights,
        "head": 2 * tokens * VOCABULARY * width,
        "attention": 4 * tokens * SEQUENCE * width * depth,
        "solving": depth * (hessians + updates),
    }


# Per stage: what is done, and how often it does each part. GPTQ goes through a block before and after it has quantized it; a
# training needs the gradients of inputs and of weights, too.
STAGES = {
    "GPTQ": (quantizing, {"layers": 2, "attention": 2, "solving": 1}),
    "forward and backward of LR-QAT": (training, {"layers": 3, "head": 2, "attention": 3}),
    "perplexity": (evaluating, {"layers": 1, "head": 1, "attention": 1}),
}


def of_model(stage: str, axis: str) -> Growth:
    """The median of ROUNDS at each size; each time a new model, since GPTQ leaves another one."""
    make, parts = STAGES[stage]
    found, operations = [], []
    for size in SIZES[axis]:
        shape = BASE | {axis: size}
        tokens = (torch.arange(shape["tokens"]).view(-1, SEQUENCE) * 7 % VOCABULARY).to(runtime.device())
        runs = []
        for _ in range(ROUNDS):
            run = make(model_of(shape["width"], shape["depth"]), tokens)
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            runs.append(time.perf_counter() - start)
        found.append(statistics.median(runs))
        operations.append(sum(parts.get(name, 0) * count for name, count in shares(**shape).items()))
    return Growth(stage, axis, SIZES[axis], found, operations)


def of_cells(stage: str) -> Growth:
    found = []
    for count in CELLS[stage]:
        with tempfile.TemporaryDirectory() as folder:
            command = (building if stage == "report" else planning)(Path(folder), count)
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            found.append(time.perf_counter() - start)
    return Growth(stage, "cells", CELLS[stage], found, CELLS[stage])


def draw(growths: list[Growth]) -> None:
    """FOLDER/growth.png: a panel for each axis."""
    points = [
        {"stage": g.stage, "of": g.axis, "size": size, "seconds": seconds}
        for g in growths
        for size, seconds in zip(g.sizes, g.seconds, strict=True)
    ]
    scale = alt.Scale(type="log", nice=False)
    chart = (
        alt.Chart(alt.Data(values=points))
        .mark_line(point=True)
        .encode(
            x=alt.X("size:Q", scale=scale, title=None),
            y=alt.Y("seconds:Q", scale=scale),
            color=alt.Color("stage:N", title=None, legend=alt.Legend(orient="bottom", labelLimit=300)),
        )
        .properties(width=180, height=180)
        .facet(alt.Facet("of:N", title=None, sort=[*SIZES, "cells"]), columns=4)
        .resolve_scale(x="independent", y="independent")
    )
    (FOLDER / "growth.png").write_bytes(vl_convert.vegalite_to_png(chart.to_dict(), scale=1.5))


def main() -> None:
    runtime.set_up(None, 0)
    growths = []
    for stage, axis in itertools.product(STAGES, SIZES):
        growths.append(of_model(stage, axis))
        print(f"{stage}, {axis}: {growths[-1].seconds} s", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    growths += [of_cells(stage) for stage in CELLS]
    draw(growths)
    record([], growths)


if __name__ == "__main__":
    main()
