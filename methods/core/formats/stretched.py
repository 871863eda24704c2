"""Half-integer levels without zero: ParetoQ's for 2 bits, stretched elastic quantization (Liu et al., arXiv 2502.02631).

    levels   +-{1/2, 3/2, ... 2^(b-1) - 1/2}

At 2 bits integers have one level above zero and two below; these have two and two, evenly spaced. In the paper's terms, which
divides by the scale of the whole range, the levels are alpha {-3/4, -1/4, 1/4, 3/4}; here s = alpha / 2. With min-max the
outermost level is the largest weight, where the paper's alpha is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.formats import SMALLEST, Format

BITS = (2, 3, 4)
ASYMMETRIC = False
ZERO = False  # no level of zero, so that a token's zeros would not stay zeros


class Stretched(Format):
    """`clip(floor(w / scale) + 1/2)`; level = code + 1/2."""

    zero = ZERO
    name = "stretched"
    container_type = "stretched"  # of ours: integers have no zero point of one half

    @property
    def largest(self) -> float:
        return 2 ** (self.bits - 1) - 0.5

    def scale_of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        """`s = max(-low, high) / (2^(b-1) - 1/2)`."""
        return self.positive(torch.maximum(-low, high) / self.largest), None

    def positive(self, scale: Tensor) -> Tensor:
        """As it is stored; where that is 0 the least that there is, for a group of zeros has no level of zero."""
        scale = self.stored_scale(scale)
        return torch.where(scale.float() >= SMALLEST, scale, torch.finfo(self.scale_dtype).tiny)

    def round(self, steps: Tensor) -> Tensor:
        return torch.floor(steps) + 0.5

    def clip(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return levels.clamp(-self.largest, self.largest)

    def limit(self, steps: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The range ends where the bins of the outermost levels do."""
        end = self.largest + 0.5
        return steps.clamp(-end, end - 1e-6)

    def encode(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return (levels - 0.5).to(torch.int8)

    def decode(self, codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype) + 0.5


FORMAT = Stretched
