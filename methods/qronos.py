"""Qronos: GPTQ that also corrects what earlier layers have done to the inputs (Zhang et al., arXiv 2505.11695).

A layer with weight W had the inputs X_0 (n, in) in the full-precision model and has X now, after rounded layers and with
rounded activations. Qronos minimizes

    ||W X_0^T - W_q X^T||^2

column by column: round the column to what makes up best for the error so far, all later columns as they are; then move the
later columns to where they make up best for what is left. By the paper's theorem this is GPTQ's recursion from the
least-squares fit of the outputs, but for the first column; methods/core/compensation.py has it. With X = X_0 it is GPTQ.
The damping is GPTQ's, which here also holds the correction back; the released code has 1e-6 of H's largest singular value.

With few calibration tokens the whole correction does harm: on SmolLM2-135M and 8,192 tokens it is worse than GPTQ, and a
quarter of it is better (reports/LOG.md). A quarter is also what GPTAQ's released code takes of its own (arXiv 2504.02692). So
`correction` scales the drift, X_0 - X; 1 is the paper's.
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
from methods.core.model.hessian import drift
from methods.core.model.walk import walk
from methods.core.scheme import Scheme

METHOD = Method("ptq", reads="calibration", divides=True)


@dataclass(frozen=True)
class Config(CompensationOptions):
    correction: float = 0.25  # share of what earlier layers have done to the inputs that is corrected

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.correction <= 1:
            raise ValueError(f"correction is {self.correction}; it must be from 0 to 1")


check = check_compensation


def held(config: Config, samples: int) -> Held:
    return Held(blockwise=True, streams=2)


@torch.no_grad()
def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    blocks = walk(
        model, tokens, batch_size=config.batch_size, sequential=True, device=device(), log=log, full_precision=True
    )
    for block in blocks:
        for stage in block:
            moved = None  # of experts: in full precision other tokens go to them
            if stage.full_precision_inputs:
                with log.timer("hessian"):
                    moved = config.correction * drift(stage.inputs, stage.full_precision_inputs)
            quantize_stage(stage, scheme, config, log, moved)
    return model
