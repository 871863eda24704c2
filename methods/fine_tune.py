"""The training control: full precision, trained on the same tokens with the same loop as the QAT methods.

What it gains over full precision is the gain of having seen more text. QAT's gain is only what lies beyond that. (With
LLM-QAT's loss there is nothing to gain: its teacher is this very model.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.job.log import RunLog
from methods.core.job.options import LowRankOptions, TrainingOptions
from methods.core.job.registry import Held, Method
from methods.core.scheme import Scheme
from methods.core.training.layers import train_weights
from methods.core.training.loop import Schedule, rate_at
from methods.core.training.losses import next_token_loss
from methods.core.training.parametrizations import LowRankTerm, rms, spread

METHOD = Method("control", reads="training", divides=True)
RATES = {"low_rank": 3e-4, "full": 1.2e-3}


@dataclass(frozen=True)
class Config(LowRankOptions, TrainingOptions):
    """The learning rate is in units of each layer's weight."""

    variant: Literal["low_rank", "full"] = "low_rank"


def held(config: Config, samples: int) -> Held:
    return Held(rank=config.rank) if config.variant == "low_rank" else Held(trained=1)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    rate = config.learning_rate or rate_at(len(tokens), RATES[config.variant])
    kind = Lora if config.variant == "low_rank" else Full
    return train_weights(
        model,
        lambda name, linear: kind(linear, config),
        lambda layer: [(layer.trained(), rate * layer.unit)],
        tokens,
        next_token_loss,
        Schedule("cosine", config.warm_up),
        log,
    )


class Lora(nn.Module):
    """`W x + (alpha / r) A (B x)` with the layer's own W frozen."""

    def __init__(self, linear: nn.Linear, config: Config):
        super().__init__()
        self.linear = linear
        self.unit = 1.0  # of the learning rate: the term is in units of the weight already
        self.low_rank = LowRankTerm(linear.weight, config.rank, config.alpha, unit=spread(linear.weight))

    def trained(self) -> list[nn.Parameter]:
        return [self.low_rank.a, self.low_rank.b]

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.low_rank.a.to(x.dtype), self.low_rank.b.to(x.dtype)
        return self.linear(x) + F.linear(F.linear(x, b), a * self.low_rank.factor)

    def folded(self, name: str, log: RunLog) -> nn.Linear:
        """The layer with the low-rank term in its weight."""
        self.linear.weight.data = self.low_rank(self.linear.weight.data).detach().to(self.linear.weight.dtype)
        return self.linear


class Full(nn.Module):
    """The layer with its weight in fp32 while it is trained."""

    def __init__(self, linear: nn.Linear, config: Config):
        super().__init__()
        self.linear = linear
        self.dtype = linear.weight.dtype
        self.unit = rms(linear.weight)  # of the learning rate
        self.weight = nn.Parameter(linear.weight.detach().float())
        linear.weight = None  # it would be kept twice

    def trained(self) -> list[nn.Parameter]:
        return [self.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.linear.bias)

    def folded(self, name: str, log: RunLog) -> nn.Linear:
        """The layer with the trained weight in its own dtype."""
        self.linear.weight = nn.Parameter(self.weight.detach().to(self.dtype), requires_grad=False)
        return self.linear
