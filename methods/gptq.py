"""GPTQ: round column by column and let the columns not yet rounded make up for the error (arXiv 2210.17323, algorithm 1).

For a layer with weight W (out, in) and calibration inputs X (n, in), GPTQ minimizes `||(W - W_q) X^T||^2`, using
`H = (2 / n) X^T X`; methods/core/compensation.py has the recursion. The inputs are those of the model as it is by then, with
all layers before in their quantized form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.compensation import quantize_stage
from methods.core.job.log import RunLog
from methods.core.job.options import CompensationOptions, check_compensation
from methods.core.job.registry import Held, Method
from methods.core.job.runtime import device
from methods.core.model.walk import walk
from methods.core.scheme import Scheme

METHOD = Method(
    "ptq",
    reads="calibration",
    paper={"damp": 0.01, "act_order": False, "static_groups": False, "true_sequential": False, "scale": "minmax"},
    divides=True,
)


@dataclass(frozen=True)
class Config(CompensationOptions):
    true_sequential: bool = True  # inside a block, a layer's inputs come from the quantized layers before it


check = check_compensation


def held(config: Config, samples: int) -> Held:
    return Held(blockwise=True)


@torch.no_grad()
def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    blocks = walk(
        model,
        tokens,
        batch_size=config.batch_size,
        sequential=config.true_sequential,
        device=device(),
        log=log,
    )
    for block in blocks:
        for stage in block:
            quantize_stage(stage, scheme, config, log)
    return model
