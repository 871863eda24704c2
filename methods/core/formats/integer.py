"""Uniform integers: consecutive levels with or without a zero point.

Codes are always signed, `q_min = -2^(b-1) .. q_max = 2^(b-1) - 1`, and

    w ~ scale * (code - zero_point)

This is the convention of compressed-tensors, so codes go to disk as they are; the papers' unsigned asymmetric grid
`0 .. 2^b - 1` is the same grid shifted by 2^(b-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.formats import Format

BITS = (2, 3, 4, 5, 6, 7, 8)
ASYMMETRIC = True


class Integer(Format):
    """`clamp(round(w / scale) + zero_point, q_min, q_max)`."""

    name = "integer"
    container_type = "int"

    @property
    def q_min(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scale_of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Symmetric: `s = max(-low, high) / q_max`; asymmetric: `s = (high - low) / (2^b - 1)`, and low is at q_min."""
        if self.symmetric:
            return self.positive(torch.maximum(-low, high) / self.q_max), None
        scale = self.positive((high - low) / (2**self.bits - 1))
        zero_point = (self.q_min - torch.round(low / scale.float())).clamp(self.q_min, self.q_max)
        return scale, zero_point.to(torch.int8)

    def signs(self, low: Tensor, high: Tensor) -> list[Tensor]:
        """Symmetric levels end at q_min = -q_max - 1, so the end that reaches further goes to the longer side. From 4 bits on
        the other sign is better for 1 % of groups of 64 and 5 % of channels, and is not tried (reports/LOG.md)."""
        if not self.symmetric:
            return super().signs(low, high)
        longer = torch.where(high > -low, -1.0, 1.0)
        return [longer, -longer] if self.bits < 4 else [longer]

    def round(self, steps: Tensor) -> Tensor:
        return torch.round(steps)

    def clip(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        if zero_point is None:
            return levels.clamp(self.q_min, self.q_max)
        return (levels + zero_point).clamp(self.q_min, self.q_max) - zero_point

    def snap_(self, steps: Tensor, zero_point: Tensor | None = None) -> Tensor:
        if zero_point is None:
            return steps.round_().clamp_(self.q_min, self.q_max)
        return steps.round_().add_(zero_point).clamp_(self.q_min, self.q_max).sub_(zero_point)

    def encode(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return (levels if zero_point is None else levels + zero_point).to(torch.int8)

    def decode(self, codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        levels = codes.to(dtype)
        return levels if zero_point is None else levels - zero_point


FORMAT = Integer
