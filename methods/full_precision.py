"""Full precision: the reference. The model as it is, through the same checkpoint and evaluation as all others."""

from __future__ import annotations

from dataclasses import dataclass

from methods.core.job.registry import Method

METHOD = Method("reference")


@dataclass(frozen=True)
class Config:
    pass


def apply(model, scheme, config, tokens, log):
    return model
