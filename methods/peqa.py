"""PEQA: train the scales only, the integers stay (Kim et al., arXiv 2305.14152).

    W_hat = (s_0 + ds) * W_int                                                              (eq. 2)

with the codes and scales of rounding to nearest, or of another method's checkpoint. The scale is trained as `s_0 exp(t)`, so
that the rate is a relative one; `dL/dt = s sum(dL/dW_hat * W_int)` over the group. It is what LR-QAT is without its low-rank
term, and what both share is in methods/core/training/layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.formats import Format, Rounded
from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, TrainingOptions
from methods.core.job.registry import CODES, WEIGHTS, Held, Method
from methods.core.scales import ScaleSearch
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by, train_weights
from methods.core.training.loop import Schedule, rate_at
from methods.core.training.losses import next_token_loss
from methods.core.training.parametrizations import Parametrization, RelativeScale, kind_of_start, start_of
from methods.core.training.sharding import frozen

METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES), paper={"scale": "minmax"}, divides=True)
RATES = {"rounding": 8e-3, "codes": 4e-3}


@dataclass(frozen=True)
class Config(ScaleOptions, TrainingOptions):
    """The scale is s_0; the learning rate is that of log s."""


def held(config: Config, samples: int) -> Held:
    return Held(frozen=1)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    rate = config.learning_rate or rate_at(len(tokens), RATES[kind_of_start(model)])
    make = quantized_by(scheme, lambda linear, form: Scaled(linear, form, config))
    schedule = Schedule("linear", config.warm_up)
    return train_weights(
        model, make, lambda weight: [([weight.scale.log_ratio], rate)], tokens, next_token_loss, schedule, log
    )


class Scaled(Parametrization):
    """The weight of one layer (out, in) as PEQA trains it."""

    def __init__(self, linear: nn.Module, form: Format, config: Config):
        super().__init__()
        self.format = form
        start = start_of(linear, form, ScaleSearch.of(config)).rounded
        self.codes = frozen(start.codes)
        self.register_buffer("zero_point", start.zero_point)
        self.scale = RelativeScale(start.scale)

    def forward(self) -> Tensor:
        return Rounded(self.codes, self.scale(), self.zero_point, self.format).value(torch.float32)

    def rounded(self) -> Rounded:
        return Rounded(self.codes, self.scale().detach(), self.zero_point, self.format)
