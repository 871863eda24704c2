"""LR-QAT: low-rank QAT on the integer grid (Bondarenko, Del Chiaro, Nagel, arXiv 2406.06385).

    W_hat = s * clamp(round(Phi_0 + sign(s_0) (alpha / r) A B), q_min, q_max),      Phi_0 = phi(W / s_0)      (eq. 6)

A (out, r) starts at zero and B (r, in) is Kaiming-uniform, so that step 0 is RTN for every phi (`store` sees to it). A, B and
s are trained with next-token loss; Phi_0 is frozen and kept in few bits, which is how memory is saved. The paper's scales
are above zero. As the rounding does not contain s, `dL/ds = sum(dL/dW_hat * W_int)`; here s is trained as `s_0 exp(t)`, whose
rate is relative. After training A B is folded into the integers.

From another method's checkpoint (`init_from`) step 0 is that checkpoint. After GPTQ and Qronos Phi_0 is what they had before
they rounded, and weights that were near a boundary can cross it; other methods leave codes only, and Phi_0 is these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.core.formats import Rounded, grouped, per_group
from methods.core.formats.integer import Integer
from methods.core.job.log import RunLog
from methods.core.job.options import LowRankOptions, ScaleOptions, TrainingOptions
from methods.core.job.registry import CODES, WEIGHTS, Held, Method
from methods.core.scales import ScaleSearch
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by, train_weights
from methods.core.training.loop import Schedule, rate_at
from methods.core.training.losses import next_token_loss
from methods.core.training.parametrizations import (
    LowRankTerm,
    Parametrization,
    RelativeScale,
    kind_of_start,
    snap,
    start_of,
)
from methods.core.training.sharding import frozen

PAPER = {"rank": 32, "alpha": 1.0, "scale": "search", "norm": 4.0}
METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES), paper=PAPER, divides=True)
RATE = 4e-3
SCALE_RATES = {"rounding": 8e-3, "codes": 4e-3}


@dataclass(frozen=True)
class Config(LowRankOptions, ScaleOptions, TrainingOptions):
    """The scale is s_0; the learning rate is that of A and B, in steps of the grid."""

    downcast: Literal["float32", "bfloat16", "float16", "fixed", "int"] = "fixed"  # phi
    scale_learning_rate: float | None = None  # of log s; None: by the number of steps and the start


def check(scheme, config) -> None:
    """ValueError for a format that the method is not defined on, or a phi that the scheme's bits do not allow."""
    if scheme.weights.format != "integer" or not scheme.weights.symmetric:
        raise ValueError("LR-QAT is defined on symmetric integers")
    if config.downcast == "int" and max(scheme.weights.widths) > 4:
        raise ValueError(
            f"downcast int packs two codes of up to 4 bits into a byte, but the scheme has {max(scheme.weights.widths)}"
        )


def held(config: Config, samples: int) -> Held:
    return Held({"float32": 4, "bfloat16": 2, "float16": 2, "fixed": 1, "int": 0.5}[config.downcast], rank=config.rank)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    rate = config.learning_rate or rate_at(len(tokens), RATE)
    scale_rate = config.scale_learning_rate or rate_at(len(tokens), SCALE_RATES[kind_of_start(model)])

    def rates(weight: LowRank):
        return [(weight.low_rank.parameters(), rate), ([weight.scale.log_ratio], scale_rate)]

    make = quantized_by(scheme, lambda linear, form: LowRank(linear, form, config))
    schedule = Schedule("linear", config.warm_up)
    return train_weights(model, make, rates, tokens, next_token_loss, schedule, log)


class LowRank(Parametrization):
    """The weight of one layer (out, in) as LR-QAT trains it."""

    def __init__(self, linear: nn.Module, form: Integer, config: Config):
        super().__init__()
        self.format, self.downcast = form, config.downcast
        start = start_of(linear, form, ScaleSearch.of(config))
        self.phi = frozen(store(start.steps, form, config.downcast))
        self.scale = RelativeScale(start.rounded.scale)
        self.low_rank = LowRankTerm(start.steps, config.rank, config.alpha)

    def levels(self) -> Tensor:
        """The integer weight (out, in) in fp32, with the straight-through gradient inside the clipping range."""
        phi = restore(self.phi, self.format, self.downcast, self.low_rank.b.shape[1])
        # A B is of low rank in the weights, and so not in steps of a grid whose scale has another sign in every group.
        start, sign = self.scale.start, per_group(self.scale.start.sign())
        weight = (grouped(phi, start) * sign).flatten(1)
        return snap((grouped(self.low_rank(weight), start) * sign).flatten(1), self.format)

    def forward(self) -> Tensor:
        scale = self.scale()
        return (grouped(self.levels(), scale) * per_group(scale)).flatten(1)

    def rounded(self) -> Rounded:
        return Rounded(self.format.encode(self.levels()), self.scale().detach(), None, self.format)


def store(phi: Tensor, form: Integer, downcast: str) -> Tensor:
    """phi: what is kept of `W / s_0` (out, in), an fp32 tensor in steps of the grid.

    fixed: `8 - b` fractional bits in int8 (Q4.4 for 4 bits). int: the codes, two to a byte (out, ceil(in / 2)) for b <= 4.
    At 8 bits fixed keeps no fraction, as int never does, and then only an A B of half a step changes a code.

    Whatever is kept rounds to the code that the value itself rounds to. One that would come to lie on the boundary to the
    neighbouring code, where the least change flips it, is kept one unit of its format away from it.
    """
    phi = phi.clamp(form.q_min, form.q_max)
    codes = phi.round()
    if downcast == "int":
        packed = (codes - form.q_min).to(torch.uint8)
        packed = nn.functional.pad(packed, (0, packed.shape[1] % 2))
        return packed[:, ::2] | packed[:, 1::2] << 4
    if downcast == "fixed":
        unit = 2.0 ** (form.bits - 8)
    else:
        unit = torch.finfo(getattr(torch, downcast)).eps * (codes.abs() + 1)
    farthest = torch.as_tensor(0.5 - unit).clamp(min=0)
    kept = codes + torch.minimum(torch.maximum(phi - codes, -farthest), farthest)
    return (kept / unit).round().to(torch.int8) if downcast == "fixed" else kept.to(getattr(torch, downcast))


def restore(stored: Tensor, form: Integer, downcast: str, columns: int) -> Tensor:
    """The fp32 tensor (out, columns) that `store` kept; int may have filled up its last byte."""
    if downcast == "fixed":
        return stored.float() / 2 ** (8 - form.bits)
    if downcast == "int":
        return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1)[:, :columns].float() + form.q_min
    return stored.float()
