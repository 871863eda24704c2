"""Full QAT: all weights trained through their rounding, the scales frozen, learned or recomputed at every step.

    W_hat = s clip(round(W / s))

and the gradient of the rounding is passed straight through. What the field trains in this way differs in two options:

    LSQ (Esser et al., arXiv 1902.08153)                scale learned, next-token loss; at 2 bits with the half-integer levels
                                                        of the format `stretched` it is ParetoQ (Liu et al., arXiv 2502.02631)
    after quantization-aware distillation               scale frozen, cross-entropy against full precision's distribution
    (arXiv 2601.20088)
    after torchao's QAT                                 scale recomputed from the weights' range, next-token loss

Those train norms, embeddings and head too; here only the linear layers of the blocks are trained. LSQ gives no gradient to
weights beyond the range, which a frozen scale would leave there for good: with one, what rounds to the outermost level has
its gradient. A recomputed min-max scale is torchao's, which spreads the range over all levels, `2 max|w| / (2^b - 1)`. It
starts from rounding, or from any step that leaves codes, on its grid: from what GPTQ or Qronos had before they rounded, from
the codes themselves after other steps. The rate of the weights is in steps of the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from methods.core.formats import Format
from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, TrainingOptions
from methods.core.job.registry import CODES, WEIGHTS, Held, Method
from methods.core.scales import ScaleSearch
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by, train_weights
from methods.core.training.loop import Schedule, rate_at
from methods.core.training.losses import distillation_loss, next_token_loss
from methods.core.training.parametrizations import FullWeight, Parametrization, Recomputed
from methods.core.training.sharding import on_device

METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES), distills=True, divides=True)
RATES = {"learned": 8e-3, "frozen": 2e-3, "recomputed": 4e-3}  # of the weights, by how scales are had
SCALE_RATE = 2e-3


@dataclass(frozen=True)
class Config(ScaleOptions, TrainingOptions):
    """The scale is that of the start; where scales are recomputed, it says which share of the range they cover."""

    scales: Literal["frozen", "learned", "recomputed"] = "learned"
    loss: Literal["next_token", "distillation"] = "next_token"
    scale_learning_rate: float | None = None  # of log s, where it is learned; None: by the number of steps

    def require_defaults(self) -> None:
        """ValueError for options that a start from codes would ignore, or that would ignore the codes."""
        super().require_defaults()
        if self.scales == "recomputed":
            raise ValueError("option scales 'recomputed' would ignore the grid that the step before has left")


def check(scheme, config) -> None:
    """ValueError for scales that the scheme's grid does not allow."""
    if config.scales == "recomputed" and not scheme.weights.symmetric:
        raise ValueError("scales are recomputed on symmetric grids only")


def held(config: Config, samples: int) -> Held:
    return Held(frozen=0, trained=1, teacher=config.loss == "distillation")


def apply(
    model: nn.Module,
    scheme: Scheme,
    config: Config,
    tokens: Tensor | None,
    log: RunLog,
    teacher: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    rate = config.learning_rate or rate_at(len(tokens), RATES[config.scales])
    scale_rate = config.scale_learning_rate or rate_at(len(tokens), SCALE_RATE)

    def make(linear: nn.Module, form) -> Parametrization:
        if config.scales == "recomputed":
            return Recomputed(linear.weight.detach(), form, _over_all_levels(config, form))
        learned = config.scales == "learned"
        return FullWeight(linear, form, ScaleSearch.of(config), learned, limit_first=learned)

    def rates(weight: Parametrization):
        if isinstance(weight, Recomputed):
            return [([weight.weight], rate * weight.step())]
        scales = [([weight.log_ratio], scale_rate)] if config.scales == "learned" else []
        return [([weight.steps], rate), *scales]

    loss = next_token_loss
    if config.loss == "distillation":
        # A model that has not been quantized is its own teacher.
        loss = distillation_loss(on_device((teacher() if teacher else copy.deepcopy(model)).requires_grad_(False)))
    schedule = Schedule("cosine", config.warm_up)
    return train_weights(model, quantized_by(scheme, make), rates, tokens, loss, schedule, log)


def _over_all_levels(config: Config, form: Format) -> Config:
    """With min-max, a gamma with which the largest weight of a group lies half way between the grid's two ends."""
    if config.scale != "minmax":
        return config
    least, most = form.clip(torch.tensor([-torch.inf, torch.inf])).tolist()
    return replace(config, gamma=config.gamma * 2 * most / (most - least))
