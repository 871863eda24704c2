"""SmoothQuant: move large channels of activations into the weights, before both are rounded (Xiao et al., arXiv 2211.10438).

    W diag(f) (x / f),      f_j = max|x_j|^alpha / max|W_j|^(1 - alpha)                               (eq. 4)

over the calibration tokens and over all layers that read the input. The norm before them takes `1 / f` over; inputs that no
norm gives stay as they are. For schemes with rounded activations: without, it only makes weights harder to round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.options import Options, require_positive
from methods.core.job.registry import Method
from methods.core.job.runtime import device
from methods.core.model.feeders import rescale
from methods.core.model.walk import Stage, walk
from methods.core.scheme import Scheme

METHOD = Method("transform", reads="calibration")


@dataclass(frozen=True)
class Config(Options):
    alpha: float = 0.5  # 0 moves everything into the activations, 1 into the weights
    batch_size: int = 4  # calibration sequences per forward pass

    def __post_init__(self):
        require_positive(self, "batch_size")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}; it must be from 0 to 1")


@torch.no_grad()
def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    blocks = walk(model, tokens, batch_size=config.batch_size, sequential=False, device=device(), log=log)
    rescale(model, blocks, lambda stage: factors(stage, config.alpha), norms_only=True, log=log)
    return model


def factors(stage: Stage, alpha: float) -> Tensor:
    """(in,)."""
    largest = torch.stack([x.flatten(0, -2).float().abs().amax(0) for x in stage.inputs]).amax(0)
    weights = torch.stack([linear.weight.float().abs().amax(0) for linear in stage.layers.values()]).amax(0)
    return largest.clamp(min=1e-5) ** alpha / weights.clamp(min=1e-5) ** (1 - alpha)
