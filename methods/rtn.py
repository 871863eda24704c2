"""RTN: round every weight to the nearest level of its grid. No data.

`W_q = s * clamp(round(W / s), q_min, q_max)`; the scale is min-max, shrunk by a fixed factor `gamma` (the scaling factor
of Hasan, arXiv 2411.06084), or searched per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.core.formats.integer import ScaleSearch, choose_scale
from methods.core.job.options import require_gamma, require_positive
from methods.core.job.runtime import device
from methods.core.model.anatomy import block_linears, replace_module
from methods.core.model.layers import QuantizedLinear

DATA = "none"
PAPER = {"scale": "minmax", "gamma": 1.0}  # what papers mean by RTN


@dataclass(frozen=True)
class Config:
    scale: Literal["minmax", "search"] = "search"
    gamma: float = 1.0  # with minmax: multiplies the min-max scale
    norm: float = 3.0  # with search: the error that is minimised, sum |w - w_q|^norm

    def __post_init__(self):
        require_gamma(self)
        require_positive(self, "norm")


def quantize(model, scheme, config, tokens, log):
    search = ScaleSearch(config.scale, config.gamma, config.norm)
    for name, linear in log.progress(block_linears(model).items(), "rounding", "layer"):
        grid = scheme.grid(name, linear.in_features)
        linear.to(device())  # a layer at a time, so the model may be larger than the device's memory
        scale, zero_point = choose_scale(linear.weight.detach(), grid, search)
        replace_module(model, name, QuantizedLinear.rounding(linear, scale, zero_point, grid).cpu())
    return model
