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

from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, TrainingOptions
from methods.core.job.registry import Held, Method
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by, train_weights
from methods.core.training.loop import Schedule, rate_at
from methods.core.training.losses import distillation_loss
from methods.core.training.parametrizations import Recomputed
from methods.core.training.sharding import on_device

METHOD = Method("qat", reads="generated", paper={"scale": "minmax", "gamma": 1.0}, divides=True)
RATES = {"minmax": 4e-3, "search": 8e-3, "hqq": 8e-3}  # by how the grid is had; the paper's has the largest steps


@dataclass(frozen=True)
class Config(ScaleOptions, TrainingOptions):
    """With scale search each group keeps the gamma that is best before training; the learning rate is in steps of each
    layer's grid."""

    scale: Literal["minmax", "search", "hqq"] = "minmax"
    warm_up: float = 0.0


def check(scheme, config) -> None:
    """ValueError for an asymmetric grid, which the paper's quantizer is not."""
    if not scheme.weights.symmetric:
        raise ValueError("LLM-QAT is defined on symmetric grids")


def held(config: Config, samples: int) -> Held:
    return Held(frozen=0, trained=1, teacher=True)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    teacher = on_device(copy.deepcopy(model).requires_grad_(False))
    rate = config.learning_rate or rate_at(len(tokens), RATES[config.scale])
    make = quantized_by(scheme, lambda linear, form: Recomputed(linear.weight.detach(), form, config))
    return train_weights(
        model,
        make,
        lambda weight: [([weight.weight], rate * weight.step())],
        tokens,
        distillation_loss(teacher),
        Schedule("cosine", config.warm_up),
        log,
    )
