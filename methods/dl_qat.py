"""DL-QAT: weight-decomposed low-rank QAT (Ke et al., EMNLP 2024 industry track, arXiv 2504.09223).

    W_hat = m * s * clamp(round((W + (alpha / r) A B) / s), q_min, q_max)

The quantization space, s and the zero point of each group, is fixed first and stays. LoRA matrices move the weight inside
it; a magnitude m per group, 1 at the start, adjusts the group's overall scale. Step 0 is RTN; afterwards `m * s` is one
scale. There is no public code, and rank and learning rates are not known to us: the defaults are chosen by experiment. A B is
measured in units of the weight's spread, so that a rate means the same for any model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.formats.integer import Grid, ScaleSearch
from methods.core.job.options import LowRankOptions, ScaleOptions, TrainingOptions, require_positive
from methods.core.job.registry import CODES, WEIGHTS, Method
from methods.core.training.layers import (
    LowRankTerm,
    Parametrization,
    fold,
    grouped,
    insert,
    round_ste,
    spread,
    start_of,
)
from methods.core.training.loop import Schedule, next_token_loss, rate_at, train

METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES))
RATE, MAGNITUDE_RATE = 1e-3, 8e-3


@dataclass(frozen=True)
class Config(LowRankOptions, ScaleOptions, TrainingOptions):
    """The scale is that of the quantization space; the learning rate is that of A and B, in units of spread(W)."""

    rank: int = 4  # with a magnitude per 128 weights, under 1 % of a 7B model's parameters
    alpha: float = 4.0
    magnitude_learning_rate: float | None = None  # None: by the number of steps

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "magnitude_learning_rate")


def apply(model, scheme, config, tokens, log):
    made = insert(model, lambda name, linear: Decomposed(linear, scheme.grid(name, linear.in_features), config))
    steps = len(tokens)
    groups = [
        {
            "params": [p for m in made for p in m.low_rank.parameters()],
            "lr": config.learning_rate or rate_at(steps, RATE),
        },
        {"params": [m.magnitude for m in made], "lr": config.magnitude_learning_rate or rate_at(steps, MAGNITUDE_RATE)},
    ]
    train(model, groups, tokens, next_token_loss, Schedule("cosine", config.warm_up), log)
    fold(model, log)
    return model


class Decomposed(Parametrization):
    """The weight of one layer (out, in) as DL-QAT trains it."""

    def __init__(self, linear: nn.Module, grid: Grid, config: Config):
        super().__init__()
        self.grid = grid
        weight = linear.weight.detach()
        start = start_of(linear, grid, ScaleSearch(config.scale, config.gamma, config.norm))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", start.scale)
        self.register_buffer("zero_point", start.zero_point)
        self.magnitude = nn.Parameter(torch.ones_like(start.scale, dtype=torch.float32))
        self.low_rank = LowRankTerm(weight, config.rank, config.alpha, unit=spread(weight))

    def codes(self) -> Tensor:
        """Codes (out, groups, columns per group) in fp32, with the straight-through gradient inside the range."""
        moved = self.low_rank(self.weight)
        codes = round_ste(grouped(moved, self.scale) / self.scale.float().unsqueeze(-1))
        if self.zero_point is not None:
            codes = codes + self.zero_point.unsqueeze(-1)
        return codes.clamp(self.grid.q_min, self.grid.q_max)

    def forward(self) -> Tensor:
        codes = self.codes()
        if self.zero_point is not None:
            codes = codes - self.zero_point.unsqueeze(-1)
        return (codes * (self.magnitude * self.scale.float()).unsqueeze(-1)).flatten(1)

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = self.magnitude.detach() * self.scale.float()
        return self.codes().flatten(1).to(torch.int8), scale, self.zero_point
