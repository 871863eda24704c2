"""LLM-QAT: full-weight QAT with distillation from the full-precision model (Liu et al., arXiv 2305.17888).

Weights are rounded to a symmetric min-max grid, `s = max|w| / (2^(b-1) - 1)`, recomputed at every forward pass and without
clipping; the gradient passes straight through (eq. 1). The loss is the cross-entropy against the teacher's distribution
(eq. 4). Activations and KV cache are quantized as the scheme says. `gamma` below 1, the scaling factor of Hasan (arXiv
2411.06084), shrinks the grid, and then the largest weights are clipped.

The released code zeroes the gradient where |w| >= 2, sums the loss over tokens and steps bf16 weights, in which updates
of 2e-5 mostly vanish. Here the gradient passes everywhere, the loss is a mean, and the trained weights are fp32. The rate
is in steps of each layer's grid: what moves a weight to another code, at any number of bits and for any model.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.core.formats.integer import Grid, ScaleSearch, choose_scale, dequantize
from methods.core.formats.integer import quantize as to_codes
from methods.core.job.options import ScaleOptions, TrainingOptions
from methods.core.job.registry import Method
from methods.core.job.runtime import device
from methods.core.training.layers import Parametrization, fold, grouped, insert, straight_through
from methods.core.training.loop import Schedule, distillation_loss, rate_at, train

METHOD = Method("qat", reads="generated", paper={"scale": "minmax", "gamma": 1.0})
RATE = 8e-3


@dataclass(frozen=True)
class Config(ScaleOptions, TrainingOptions):
    """With scale search each group keeps the gamma that is best before training; the learning rate is in steps of each
    layer's grid."""

    scale: Literal["minmax", "search"] = "minmax"
    warm_up: float = 0.0


def check(scheme, config) -> None:
    """ValueError for an asymmetric grid, which the paper's quantizer is not."""
    if not scheme.weights.symmetric:
        raise ValueError("LLM-QAT is defined on symmetric grids")


def apply(model, scheme, config, tokens, log):
    teacher = copy.deepcopy(model).requires_grad_(False).to(device())
    made = insert(
        model, lambda name, linear: MinMax(linear.weight.detach(), scheme.grid(name, linear.in_features), config)
    )
    rate = config.learning_rate or rate_at(len(tokens), RATE)
    groups = [{"params": [m.weight], "lr": rate * m.step()} for m in made]
    train(model, groups, tokens, distillation_loss(teacher), Schedule("cosine", config.warm_up), log)
    fold(model, log)
    return model


class MinMax(Parametrization):
    """The weight of one layer (out, in) as LLM-QAT trains it: RTN of its current value, `s = gamma * max|w| / q_max`."""

    def __init__(self, weight: Tensor, grid: Grid, config: Config):
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(weight.float().clone())
        self.gamma = config.gamma
        if config.scale == "search":
            found, _ = choose_scale(weight, grid, ScaleSearch("search", norm=config.norm))
            largest = grouped(self.weight.detach(), found).abs().amax(-1)
            self.gamma = torch.where(largest > 0, found.float() * grid.q_max / largest, 1.0)

    def step(self) -> float:
        """The mean step of the grid."""
        return float(self._round(self.weight.detach())[1].float().mean())

    def forward(self) -> Tensor:
        return straight_through(self.weight, lambda w: dequantize(*self._round(w), torch.float32))

    def integers(self) -> tuple[Tensor, Tensor, None]:
        return self._round(self.weight.detach())

    def _round(self, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        scale, _ = choose_scale(weight, self.grid, ScaleSearch("minmax", self.gamma))
        return to_codes(weight, scale, None, self.grid), scale, None
