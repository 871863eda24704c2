"""E2M1, the 4-bit float of the OCP Microscaling specification, with a scale per group that is any number of its dtype.

    levels   +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}

A code is the place of the magnitude in this list with the level's sign, -7 .. 7: there is one zero. (MXFP4 and NVFP4 have the
same levels under scales that are powers of two, or E4M3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.formats import Format

BITS = (4,)
ASYMMETRIC = False
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class E2M1(Format):
    """Two bits of exponent, one of mantissa; ties go to the even mantissa."""

    name = "e2m1"
    container_type = "e2m1"  # of ours, so that no other program takes the codes for integers

    def scale_of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, None]:
        """`s = max(-low, high) / 6`."""
        return self.positive(torch.maximum(-low, high) / MAGNITUDES[-1]), None

    def round(self, steps: Tensor) -> Tensor:
        """Levels are 0.5 apart below 2, 1 apart below 4, and 2 apart above."""
        size = steps.abs()
        spacing = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(steps.dtype)
        return torch.round(steps / spacing) * spacing

    def clip(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        return levels.clamp(-MAGNITUDES[-1], MAGNITUDES[-1])

    def encode(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        # Twice a magnitude up to 2 is its place; 3, 4 and 6 are 5, 6 and 7.
        size = levels.abs()
        place = torch.where(size <= 2, 2 * size, torch.where(size <= 4, size + 2, size + 1))
        return (levels.sign() * place).to(torch.int8)

    def decode(self, codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        magnitudes = torch.tensor(MAGNITUDES, dtype=dtype, device=codes.device)
        return magnitudes[codes.abs().long()] * codes.sign().to(dtype)


FORMAT = E2M1
