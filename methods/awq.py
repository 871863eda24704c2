"""AWQ: scale up the input channels that activations make important, before rounding (Lin et al., arXiv 2306.00978).

    Q(W diag(f)) (x / f),      f = mean|x|^alpha                                                     (eq. 4 and 5)

with one alpha per input, the one of 0, 0.05, ... 0.95 for which rounding to nearest changes the layers' outputs least. What
feeds the layers takes `1 / f` over: a norm, or a linear layer whose output is multiplied channel by channel. The function is
the same until something rounds it, so AWQ is a step before RTN or GPTQ. It helps both at 4 bits, and makes both worse at 3 in
symmetric groups of 64 (SmolLM2-135M; reports/LOG.md, 2026-11-29).

The released code measures the change behind the whole attention or MLP; here it is that of the layers' own outputs, by their
Hessian. Its search of clipping is RTN's scale search. Under rounded activations the loss does not see how `x / f` would be
rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, require_positive
from methods.core.job.registry import Method
from methods.core.job.runtime import device
from methods.core.model.feeders import rescale
from methods.core.model.hessian import Hessian
from methods.core.model.walk import Stage, walk
from methods.core.scales import ScaleSearch, rounded_to_nearest
from methods.core.scheme import Scheme

METHOD = Method("transform", reads="calibration", for_scheme=True)
ALPHAS = tuple(k / 20 for k in range(20))


@dataclass(frozen=True)
class Config(ScaleOptions):
    """The scale is that of the rounding which the factors are chosen for, the step that follows. Min-max scales prefer other
    factors than searched ones."""

    batch_size: int = 4  # calibration sequences per forward pass

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "batch_size")


@torch.no_grad()
def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    blocks = walk(model, tokens, batch_size=config.batch_size, sequential=False, device=device(), log=log)
    rescale(model, blocks, lambda stage: best_factors(stage, scheme, config), norms_only=False, log=log)
    return model


def best_factors(stage: Stage, scheme: Scheme, config: Config) -> Tensor:
    """(in,): the factors that lose least, 1 for each channel if none lose less than no factors."""
    first = next(iter(stage.layers.values()))
    hessian = Hessian(first.in_features, first.weight.device)
    size = torch.zeros(first.in_features, device=first.weight.device)
    for x in stage.inputs:
        hessian.add(x)
        size += x.flatten(0, -2).float().abs().sum(0)
    size /= hessian.rows
    moments, best, least = hessian.value(), torch.ones_like(size), torch.inf
    for alpha in ALPHAS:
        factors = size.clamp(min=1e-4) ** alpha
        factors = factors / (factors.max() * factors.min()).sqrt()
        if (loss := _loss(stage, scheme, config, factors, moments)) < least:
            best, least = factors, loss
    return best


def _loss(stage: Stage, scheme: Scheme, config: Config, factors: Tensor, moments: Tensor) -> float:
    """Sum over the layers of `||(Q(W diag(f)) diag(1 / f) - W) X^T||^2`, rounded to nearest."""
    loss, search = 0.0, ScaleSearch.of(config)
    for name, linear in stage.layers.items():
        weight = linear.weight.float()
        form = scheme.number_format(name, linear.in_features)
        scaled = weight * factors
        rounded = rounded_to_nearest(scaled, form, search).value(torch.float32)
        change = rounded / factors - weight
        loss += float(((change @ moments) * change).sum())
    return loss
