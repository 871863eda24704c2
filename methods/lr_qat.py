"""LR-QAT: low-rank QAT on the integer grid (Bondarenko, Del Chiaro, Nagel, arXiv 2406.06385).

    W_hat = s * clamp(round(Phi_0 + (alpha / r) A B), q_min, q_max),      Phi_0 = phi(W / s_0)      (eq. 6)

A (out, r) starts at zero and B (r, in) is Kaiming-uniform, so that step 0 is RTN for every phi (`store` sees to it). A, B and
s are trained with next-token loss; Phi_0 is frozen and kept in few bits, which is how memory is saved. As the rounding does
not contain s, `dL/ds = sum(dL/dW_hat * W_int)`; here s is trained as `s_0 exp(t)`, whose rate is relative. After training A B
is folded into the integers.

From another method's checkpoint (`init_from`), Phi_0 is what that method had before it rounded: step 0 is its checkpoint, and
weights that were near a boundary can cross it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.core.formats.integer import Grid, ScaleSearch
from methods.core.job.options import LowRankOptions, ScaleOptions, TrainingOptions, require_positive
from methods.core.job.registry import CODES, WEIGHTS, Method
from methods.core.training.layers import (
    LowRankTerm,
    Parametrization,
    RelativeScale,
    fold,
    grouped,
    insert,
    round_ste,
    start_of,
)
from methods.core.training.loop import Schedule, next_token_loss, rate_at, train

METHOD = Method("qat", reads="training", takes=(WEIGHTS, CODES), paper={"rank": 32, "alpha": 1.0, "scale": "search"})
RATE, SCALE_RATE = 4e-3, 8e-3


@dataclass(frozen=True)
class Config(LowRankOptions, ScaleOptions, TrainingOptions):
    """The scale is s_0; the learning rate is that of A and B, in steps of the grid."""

    downcast: Literal["float32", "bfloat16", "float16", "fixed", "int"] = "fixed"  # phi
    scale_learning_rate: float | None = None  # of log s; None: by the number of steps

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "scale_learning_rate")


def check(scheme, config) -> None:
    """ValueError for a phi that the scheme's bits do not allow."""
    if config.downcast == "int" and max(scheme.weights.widths) > 4:
        raise ValueError(
            f"downcast int packs two codes of up to 4 bits into a byte, but the scheme has {max(scheme.weights.widths)}"
        )
    if not scheme.weights.symmetric:
        raise ValueError("LR-QAT is defined on symmetric grids")


def apply(model, scheme, config, tokens, log):
    made = insert(model, lambda name, linear: LowRank(linear, scheme.grid(name, linear.in_features), config))
    steps = len(tokens)
    groups = [
        {
            "params": [p for m in made for p in m.low_rank.parameters()],
            "lr": config.learning_rate or rate_at(steps, RATE),
        },
        {"params": [m.scale.log_ratio for m in made], "lr": config.scale_learning_rate or rate_at(steps, SCALE_RATE)},
    ]
    train(model, groups, tokens, next_token_loss, Schedule("linear", config.warm_up), log)
    fold(model, log)
    return model


class LowRank(Parametrization):
    """The weight of one layer (out, in) as LR-QAT trains it."""

    def __init__(self, linear: nn.Module, grid: Grid, config: Config):
        super().__init__()
        self.grid, self.downcast = grid, config.downcast
        start = start_of(linear, grid, ScaleSearch(config.scale, config.gamma, config.norm))
        self.register_buffer("phi", store(start.steps, grid, config.downcast))
        self.scale = RelativeScale(start.scale)
        self.low_rank = LowRankTerm(start.steps, config.rank, config.alpha)

    def codes(self) -> Tensor:
        """The integer weight (out, in) in fp32, with the straight-through gradient inside the clipping range."""
        phi = restore(self.phi, self.grid, self.downcast)[:, : self.low_rank.b.shape[1]]
        return round_ste(self.low_rank(phi)).clamp(self.grid.q_min, self.grid.q_max)

    def forward(self) -> Tensor:
        scale = self.scale()
        return (grouped(self.codes(), scale) * scale.unsqueeze(-1)).flatten(1)

    def integers(self) -> tuple[Tensor, Tensor, None]:
        return self.codes().to(torch.int8), self.scale().detach(), None


def store(phi: Tensor, grid: Grid, downcast: str) -> Tensor:
    """phi: what is kept of `W / s_0` (out, in), an fp32 tensor in steps of the grid.

    fixed: `8 - b` fractional bits in int8 (Q4.4 for 4 bits). int: the codes, two to a byte (out, ceil(in / 2)) for b <= 4.
    At 8 bits fixed keeps no fraction, as int never does, and then only an A B of half a step changes a code.

    Whatever is kept rounds to the code that the value itself rounds to. One that would come to lie on the boundary to the
    neighbouring code, where the least change flips it, is kept one unit of its format away from it.
    """
    phi = phi.clamp(grid.q_min, grid.q_max)
    codes = phi.round()
    if downcast == "int":
        packed = (codes - grid.q_min).to(torch.uint8)
        packed = nn.functional.pad(packed, (0, packed.shape[1] % 2))
        return packed[:, ::2] | packed[:, 1::2] << 4
    if downcast == "fixed":
        unit = 2.0 ** (grid.bits - 8)
    else:
        unit = torch.finfo(getattr(torch, downcast)).eps * (codes.abs() + 1)
    farthest = torch.as_tensor(0.5 - unit).clamp(min=0)
    kept = codes + torch.minimum(torch.maximum(phi - codes, -farthest), farthest)
    return (kept / unit).round().to(torch.int8) if downcast == "fixed" else kept.to(getattr(torch, downcast))


def restore(stored: Tensor, grid: Grid, downcast: str) -> Tensor:
    """The fp32 tensor (out, in) that `store` kept, with one more column if int had to fill up a byte."""
    if downcast == "fixed":
        return stored.float() / 2 ** (8 - grid.bits)
    if downcast == "int":
        return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).float() + grid.q_min
    return stored.float()
