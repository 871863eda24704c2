"""PEQA: train the scales only, the integers stay (Kim et al., arXiv 2305.14152).

    W_hat = (s_0 + ds) * W_int                                                              (eq. 2)

with the codes and scales of rounding to nearest, or of another method's checkpoint. The scale is trained as `s_0 exp(t)`, so
that the rate is a relative one; `dL/dt = s sum(dL/dW_hat * W_int)` over the group. It is what LR-QAT is without its low-rank
term, and what both share is in methods/core/training/layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from methods.core.formats.integer import Grid, ScaleSearch
from methods.core.job.options import ScaleOptions, TrainingOptions
from methods.core.job.registry import CODES, WEIGHTS, Method
from methods.core.training.layers import Parametrization, RelativeScale, fold, grouped, insert, start_of
from methods.core.training.loop import Schedule, next_token_loss, rate_at, train

METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES), paper={"scale": "minmax"})
RATE = 8e-3


@dataclass(frozen=True)
class Config(ScaleOptions, TrainingOptions):
    """The scale is s_0; the learning rate is that of log s."""


def apply(model, scheme, config, tokens, log):
    made = insert(model, lambda name, linear: Scaled(linear, scheme.grid(name, linear.in_features), config))
    rate = config.learning_rate or rate_at(len(tokens), RATE)
    groups = [{"params": [m.scale.log_ratio for m in made], "lr": rate}]
    train(model, groups, tokens, next_token_loss, Schedule("linear", config.warm_up), log)
    fold(model, log)
    return model


class Scaled(Parametrization):
    """The weight of one layer (out, in) as PEQA trains it."""

    def __init__(self, linear: nn.Module, grid: Grid, config: Config):
        super().__init__()
        self.grid = grid
        start = start_of(linear, grid, ScaleSearch(config.scale, config.gamma, config.norm))
        self.register_buffer("codes", start.codes)
        self.register_buffer("zero_point", start.zero_point)
        self.scale = RelativeScale(start.scale)

    def forward(self) -> Tensor:
        codes = grouped(self.codes, self.scale.start).float()
        if self.zero_point is not None:
            codes = codes - self.zero_point.unsqueeze(-1)
        return (codes * self.scale().unsqueeze(-1)).flatten(1)

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.codes, self.scale().detach(), self.zero_point
