"""DL-QAT: weight-decomposed low-rank QAT (Ke et al., EMNLP 2024 industry track, arXiv 2504.09223).

    W_hat = m * s * clamp(round((W + (alpha / r) A B) / s), q_min, q_max)

The quantization space, s and the zero point of each group, is fixed first and stays. LoRA matrices move the weight inside
it; a magnitude m per group, 1 at the start, adjusts the group's overall scale. Step 0 is RTN; afterwards `m * s` is one
scale. From another method's checkpoint W is what that method had before it rounded, and step 0 is the checkpoint. There is no
public code, and rank and learning rates are not known to us: the defaults are chosen by experiment. A B is measured in units
of the weight's spread, so that a rate means the same for any model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.formats import Format, Rounded, in_steps, per_group
from methods.core.job.log import RunLog
from methods.core.job.options import LowRankOptions, ScaleOptions, TrainingOptions
from methods.core.job.registry import CODES, WEIGHTS, Held, Method
from methods.core.scales import ScaleSearch
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by, train_weights
from methods.core.training.loop import Schedule, rate_at
from methods.core.training.losses import next_token_loss
from methods.core.training.parametrizations import LowRankTerm, Parametrization, snap, spread, start_of
from methods.core.training.sharding import frozen

METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES), divides=True)
RATE, MAGNITUDE_RATE = 3e-3, 8e-3


@dataclass(frozen=True)
class Config(LowRankOptions, ScaleOptions, TrainingOptions):
    """The scale is that of the quantization space; the learning rate is that of A and B, in units of spread(W)."""

    rank: int = 4  # with a magnitude per 128 weights, under 1 % of a 7B model's parameters
    alpha: float = 4.0
    magnitude_learning_rate: float | None = None  # None: by the number of steps


def held(config: Config, samples: int) -> Held:
    return Held(rank=config.rank)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    rate = config.learning_rate or rate_at(len(tokens), RATE)
    magnitude_rate = config.magnitude_learning_rate or rate_at(len(tokens), MAGNITUDE_RATE)

    def rates(weight: Decomposed):
        return [(weight.low_rank.parameters(), rate), ([weight.magnitude], magnitude_rate)]

    make = quantized_by(scheme, lambda linear, form: Decomposed(linear, form, config))
    schedule = Schedule("cosine", config.warm_up)
    return train_weights(model, make, rates, tokens, next_token_loss, schedule, log)


class Decomposed(Parametrization):
    """The weight of one layer (out, in) as DL-QAT trains it."""

    def __init__(self, linear: nn.Module, form: Format, config: Config):
        super().__init__()
        self.format = form
        start = start_of(linear, form, ScaleSearch.of(config))
        self.weight = frozen(start.weight)
        self.scale = frozen(start.rounded.scale)
        self.register_buffer("zero_point", start.rounded.zero_point)
        self.magnitude = nn.Parameter(torch.ones_like(start.rounded.scale, dtype=torch.float32))
        self.low_rank = LowRankTerm(start.weight, config.rank, config.alpha, unit=spread(start.weight))

    def levels(self) -> Tensor:
        """Levels (out, groups, columns per group), fp32, with the straight-through gradient inside the range."""
        steps = in_steps(self.low_rank(self.weight), self.scale)
        return snap(steps, self.format, per_group(self.zero_point))

    def forward(self) -> Tensor:
        return (self.levels() * per_group(self.magnitude * self.scale.float())).flatten(1)

    def rounded(self) -> Rounded:
        scale = self.magnitude.detach() * self.scale.float()
        codes = self.format.encode(self.levels(), per_group(self.zero_point)).flatten(1)
        return Rounded(codes, scale, self.zero_point, self.format)
