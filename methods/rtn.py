"""RTN: round every weight to the nearest level of its format. No data.

`W_q = s * clamp(round(W / s), q_min, q_max)`; the scale is min-max, shrunk by a fixed factor `gamma` (the scaling factor
of Hasan, arXiv 2411.06084), or searched per group.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions
from methods.core.job.registry import Held, Method
from methods.core.job.runtime import device
from methods.core.model.anatomy import linears_in, replace_module
from methods.core.model.layers import QuantizedLinear
from methods.core.model.resume import Resume
from methods.core.scales import ScaleSearch, rounded_to_nearest
from methods.core.scheme import Scheme

METHOD = Method("ptq", paper={"scale": "minmax", "gamma": 1.0})  # what papers mean by RTN


@dataclass(frozen=True)
class Config(ScaleOptions):
    pass


def held(config: Config, samples: int) -> Held:
    return Held(blockwise=True)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    resume = Resume(model, log)
    for index, block in resume.remaining("rounding"):
        for name in linears_in(block):
            linear = block.get_submodule(name)
            form = scheme.number_format(f"{resume.prefix}.{index}.{name}", linear.in_features)
            linear.to(device())  # a layer at a time, so the model may be larger than the device's memory
            rounded = rounded_to_nearest(linear.weight.detach(), form, ScaleSearch.of(config))
            replace_module(block, name, QuantizedLinear.replacing(linear, rounded).cpu())
        resume.finished(index)
    return model
