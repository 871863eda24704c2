"""How the seconds of each stage grow with width, depth, tokens and cells: slopes in log-log, beside those of its operations.

python -m tests.bench.growth        (about ten minutes; random models, generated results, nothing to prepare)

A slope is of a least-squares line through all sizes. What a stage takes at its start makes it less, never more.
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
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evals.perplexity import token_nll
from methods import gptq, lr_qat
from methods.core.job import runtime
from methods.core.job.log import RunLog
from methods.core.scheme import Scheme
from methods.core.training.layers import insert, quantized_by
from methods.core.training.losses import next_token_loss
from tests.bench.report import write_results
from tests.bench.startup import MANY, PLAN
from tests.bench.table import FOLDER, Growth, record

SCHEME = Scheme.from_dict("w4-g64", {"weights": {"bits": 4, "group_size": 64}})
BASE = {"width": 256, "depth": 4, "tokens": 4096}
SIZES = {"width": (256, 512, 1024), "depth": (2, 4, 8, 16), "tokens": (2048, 4096, 8192, 16384)}
CELLS = {"report": (60, 125, 250, 500), "planning": (500, 1000, 2000, 4000)}
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


# Per stage: what is done, and the power that its operations grow with. GPTQ inverts a Hessian of each layer's inputs.
STAGES = {
    "GPTQ": (quantizing, {"width": 3, "depth": 1, "tokens": 1}),
    "a training step of LR-QAT": (training, {"width": 2, "depth": 1, "tokens": 1}),
    "perplexity": (evaluating, {"width": 2, "depth": 1, "tokens": 1}),
}


def of_model(stage: str, axis: str) -> Growth:
    """The median of ROUNDS at each size; each time a new model, since GPTQ leaves another one."""
    make, powers = STAGES[stage]
    found = []
    for size in SIZES[axis]:
        shape = BASE | {axis: size}
        tokens = torch.arange(shape["tokens"]).view(-1, SEQUENCE) * 7 % VOCABULARY
        runs = []
        for _ in range(ROUNDS):
            run = make(model_of(shape["width"], shape["depth"]), tokens)
            start = time.perf_counter()
            run()
            runs.append(time.perf_counter() - start)
        found.append(statistics.median(runs))
    return Growth(stage, axis, SIZES[axis], tuple(found), powers[axis])


def of_cells(stage: str) -> Growth:
    found = []
    for count in CELLS[stage]:
        with tempfile.TemporaryDirectory() as folder:
            command = (building if stage == "report" else planning)(Path(folder), count)
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            found.append(time.perf_counter() - start)
    return Growth(stage, "cells", CELLS[stage], tuple(found), 1)


def building(folder: Path, count: int) -> list[str]:
    return [
        "-m",
        "reports.build",
        str(write_results(folder / "results", count)),
        "--output",
        str(folder / "summary.md"),
    ]


def planning(folder: Path, count: int) -> list[str]:
    many = MANY | {"seeds": list(range(count // (len(MANY["schemes"]) * len(MANY["methods"]))))}
    (folder / "many.yaml").write_text(yaml.safe_dump({"name": "many", "matrix": [many]}))
    return [*PLAN, "--configfile", str(folder / "many.yaml"), "--", "reports/summary.md"]


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
        print(f"{stage}, {axis}: slope {growths[-1].slope:.2f}", flush=True)
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    growths += [of_cells(stage) for stage in CELLS]
    draw(growths)
    record([], growths)


if __name__ == "__main__":
    main()
