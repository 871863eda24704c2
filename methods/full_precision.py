"""Full precision: the reference. The model as it is, through the same checkpoint and evaluation as all others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.registry import Method
from methods.core.scheme import Scheme

METHOD = Method("reference")


@dataclass(frozen=True)
class Config:
    pass


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    return model
