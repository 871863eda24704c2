"""Block-AP, phase 1 of EfficientQAT: all weights and scales of one decoder block after the other (arXiv 2407.11062).

    W_hat = s clip(round(W / s))

W and s are trained with Adam for the squared error of the block's output against full precision's, on the inputs that the
quantized blocks before it give. Followed by PEQA, the paper's second phase, it is EfficientQAT. The paper has asymmetric
grids and trains their zero points too; here they stay. Its error is summed over all tokens; here each token's, relative to
its own size, is half of it. Rates are relative: that of W in steps of the grid, that of s of log s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, TrainingOptions, require_positive
from methods.core.job.registry import Held, Method
from methods.core.scales import ScaleSearch
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by
from methods.core.training.loop import EPSILON, Schedule, rate_at
from methods.core.training.parametrizations import FullWeight
from methods.core.training.reconstruction import reconstruct

METHOD = Method("qat", reads="training")
RATE, SCALE_RATE = 1.6e-2, 8e-3


@dataclass(frozen=True)
class Config(ScaleOptions, TrainingOptions):
    """The scale is that of the start."""

    epochs: int = 2  # passes of each block over all tokens
    scale_learning_rate: float | None = None  # of log s
    warm_up: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "epochs")


def held(config: Config, samples: int) -> Held:
    return Held(trained=1, blockwise=True, streams=2, rounds=config.epochs)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    steps = config.epochs * tokens.shape[:2].numel()  # one for each batch
    rate = config.learning_rate or rate_at(steps, RATE)
    scale_rate = config.scale_learning_rate or rate_at(steps, SCALE_RATE)
    schedule = Schedule("cosine", config.warm_up)
    parameters, moved, flops = reconstruct(
        model,
        quantized_by(
            scheme, lambda linear, form: FullWeight(linear, form, ScaleSearch.of(config), True, limit_first=False)
        ),
        lambda weight: [
            {"params": [weight.steps], "lr": rate},
            {"params": [weight.log_ratio], "lr": scale_rate},
        ],
        lambda groups: torch.optim.AdamW(groups, betas=schedule.betas, eps=EPSILON, weight_decay=0.0, fused=True),
        tokens.flatten(0, 2),
        steps=steps,
        batch_size=tokens.shape[2],
        schedule=schedule,
        keep_best=False,
        log=log,
    )
    log.trained(
        steps=steps,
        tokens=config.epochs * tokens.numel(),
        flops=flops,
        parameters=parameters,
        moved=moved,
        schedule={"decay": schedule.decay, "warm_up": schedule.warm_up, "betas": schedule.betas},
        learning_rates=(rate, scale_rate),
    )
    return model
