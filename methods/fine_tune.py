"""The training control: full precision, trained on the same tokens with the same loop as the QAT methods.

What it gains over full precision is the gain of having seen more text. QAT's gain is only what lies beyond that.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from methods.core.modules import replace_module
from methods.core.qat import LowRankTerm, Parametrization, insert, trained_layers
from methods.core.training import Schedule, distillation_loss, next_token_loss, train

DATA = "training"
QUANTIZES = False


@dataclass(frozen=True)
class Config:
    variant: Literal["low_rank", "full"] = "low_rank"
    loss: Literal["next_token", "distillation"] = "next_token"
    rank: int = 32
    alpha: float = 32.0
    learning_rate: float = 1e-3
    warm_up: float = 0.1

    def __post_init__(self):
        for name in ("rank", "alpha", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")


def quantize(model, scheme, config, tokens, log):
    loss = next_token_loss if config.loss == "next_token" else distillation_loss(copy.deepcopy(model))
    kind = Lora if config.variant == "low_rank" else Full
    made = insert(model, lambda linear: kind(linear.weight.detach(), config))
    groups = [{"params": [p for m in made for p in m.parameters()], "lr": config.learning_rate}]
    train(model, groups, tokens, loss, Schedule("cosine", config.warm_up), log)
    dtype = next(model.parameters()).dtype
    for name, layer in trained_layers(model):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=dtype)
        linear.weight = nn.Parameter(layer.parametrization().detach().to(dtype), requires_grad=False)
        linear.bias = layer.bias
        replace_module(model, name, linear)
    return model


class Lora(Parametrization):
    """LoRA: `W + (alpha / r) A B` with W frozen."""

    def __init__(self, weight: Tensor, config: Config):
        super().__init__()
        self.register_buffer("weight", weight)
        self.low_rank = LowRankTerm(weight, config.rank, config.alpha)

    def forward(self) -> Tensor:
        return self.low_rank(self.weight)


class Full(Parametrization):
    """The weight itself, in fp32."""

    def __init__(self, weight: Tensor, config: Config):
        super().__init__()
        self.weight = nn.Parameter(weight.float().clone())

    def forward(self) -> Tensor:
        return self.weight.clone()
