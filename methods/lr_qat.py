"""LR-QAT: low-rank QAT on the integer grid (Bondarenko, Del Chiaro, Nagel, arXiv 2406.06385).

    W_hat = s * clamp(round(Phi_0 + (alpha / r) A B), q_min, q_max),      Phi_0 = phi(W / s_0)      (eq. 6)

A (out, r) starts at zero and B (r, in) is Kaiming-uniform, so that step 0 is RTN (up to phi). A, B and s are trained with
next-token loss; Phi_0 is frozen and kept in whatever phi makes of it, which is where the memory goes. As the rounding does
not contain s, `dL/ds = sum(dL/dW_hat * W_int)`. Afterwards A B is gone: it is in the integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from methods.core.grid import Grid, ScaleSearch
from methods.core.options import require_gamma, require_positive, require_share_of_steps
from methods.core.qat import LowRankTerm, Parametrization, fold, grouped, initial_grid, insert, round_ste
from methods.core.training import Schedule, next_token_loss, train

DATA = "training"
INIT_FROM = True


@dataclass(frozen=True)
class Config:
    rank: int = 32
    alpha: float = 32.0  # the paper's 1 is for ten thousand steps
    downcast: Literal["float32", "bfloat16", "float16", "fixed", "int"] = "fixed"  # phi
    scale: Literal["minmax", "search"] = "search"  # s_0
    gamma: float = 1.0  # with minmax: multiplies the min-max scale
    learning_rate: float = 1e-2  # of A and B
    scale_learning_rate: float = 1e-3
    warm_up: float = 0.1

    def __post_init__(self):
        require_gamma(self)
        require_positive(self, "rank", "alpha", "learning_rate", "scale_learning_rate")
        require_share_of_steps(self, "warm_up")


def check(scheme, config) -> None:
    """ValueError for a phi that the scheme's bits do not allow."""
    if config.downcast == "int" and max(scheme.weights.widths) > 4:
        raise ValueError(
            f"downcast int packs two codes of up to 4 bits into a byte, but the scheme has {max(scheme.weights.widths)}"
        )
    if not scheme.weights.symmetric:
        raise ValueError("LR-QAT is defined on symmetric grids")


def quantize(model, scheme, config, tokens, log):
    made = insert(model, lambda name, linear: LowRank(linear, scheme.grid(name, linear.in_features), config))
    groups = [
        {"params": [p for m in made for p in m.low_rank.parameters()], "lr": config.learning_rate},
        {"params": [m.scale for m in made], "lr": config.scale_learning_rate},
    ]
    train(model, groups, tokens, next_token_loss, Schedule("linear", config.warm_up), log)
    fold(model, log)
    return model


class LowRank(Parametrization):
    """The weight of one layer (out, in) as LR-QAT trains it."""

    def __init__(self, linear: nn.Module, grid: Grid, config: Config):
        super().__init__()
        self.grid, self.downcast = grid, config.downcast
        weight = linear.weight.detach()
        # The scale is stored rounded; starting from its rounded value, step 0 is RTN exactly.
        scale, _ = initial_grid(linear, grid, ScaleSearch(config.scale, config.gamma, norm=4.0))
        phi = (grouped(weight.float(), scale) / scale.float().unsqueeze(-1)).flatten(1)
        self.register_buffer("phi", store(phi, grid, config.downcast))
        self.scale = nn.Parameter(scale.float())
        self.low_rank = LowRankTerm(weight, config.rank, config.alpha)

    def codes(self) -> Tensor:
        """The integer weight (out, in) in fp32, with the straight-through gradient inside the clipping range."""
        phi = restore(self.phi, self.grid, self.downcast)[:, : self.low_rank.b.shape[1]]
        return round_ste(self.low_rank(phi)).clamp(self.grid.q_min, self.grid.q_max)

    def forward(self) -> Tensor:
        return (grouped(self.codes(), self.scale) * self.scale.unsqueeze(-1)).flatten(1)

    def integers(self) -> tuple[Tensor, Tensor, None]:
        return self.codes().to(torch.int8), self.scale.detach(), None


def store(phi: Tensor, grid: Grid, downcast: str) -> Tensor:
    """phi: what is kept of `W / s_0` (out, in), an fp32 tensor on the scale of the integers.

    fixed: `8 - b` fractional bits in int8 (Q4.4 for 4 bits). int: the codes, two to a byte (out, ceil(in / 2)) for b <= 4.
    """
    if downcast == "fixed":
        return (phi.clamp(grid.q_min, grid.q_max) * 2 ** (8 - grid.bits)).round().clamp(-128, 127).to(torch.int8)
    if downcast == "int":
        codes = (phi.round().clamp(grid.q_min, grid.q_max) - grid.q_min).to(torch.uint8)
        codes = nn.functional.pad(codes, (0, codes.shape[1] % 2))
        return codes[:, ::2] | codes[:, 1::2] << 4
    return phi.to(getattr(torch, downcast))


def restore(stored: Tensor, grid: Grid, downcast: str) -> Tensor:
    """The fp32 tensor (out, in) that `store` kept, with one more column if int had to fill up a byte."""
    if downcast == "fixed":
        return stored.float() / 2 ** (8 - grid.bits)
    if downcast == "int":
        return torch.stack([stored & 15, stored >> 4], dim=-1).flatten(1).float() + grid.q_min
    return stored.float()
