"""The quantized linear layer that every method leaves behind: integer codes, scales, zero points."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.formats.integer import Grid, dequantize, quantize
from methods.core.model.activations import copy_marks, fake_quantize_tokens
from methods.core.scheme import TokenScheme

RESIDUAL_STEPS = 256  # of a residual to a step of the grid


def residual(steps: Tensor, codes: Tensor) -> Tensor:
    """What rounding `steps`, weights in steps of the grid, to `codes` took off, int8; where it clipped, half a step at most.

    Rounding to nearest leaves up to half a step; 127 keeps what is left on its side of the boundary.
    """
    return ((steps - codes) * RESIDUAL_STEPS).round().clamp(-127, 127).to(torch.int8)


def residual_steps(residual: Tensor) -> Tensor:
    """A residual in steps of the grid, fp32."""
    return residual.float() / RESIDUAL_STEPS


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is `scale * (codes - zero_point)`.

    codes (out, in) int8; scale and zero_point (out, groups), zero_point int8 or None; bias (out,) or None. `weight` is
    the dequantized matrix in the dtype the model computes in: derived, never stored. `input_tokens` and `output_tokens`
    say how the layer quantizes what it receives and what it returns, token by token; None for not at all.

    `residual` (out, in) int8, of a method that changes weights before it rounds them: what the rounding took off, in 256ths
    of a step. A training that starts from the layer needs it; the layer itself does not, nor does an evaluation.
    """

    input_tokens: TokenScheme | None = None
    output_tokens: TokenScheme | None = None
    residual: Tensor | None = None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        grid: Grid,
        bias: Tensor | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.grid = grid
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.to(grid.scale_dtype))
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("weight", dequantize(codes, self.scale, zero_point, dtype), persistent=False)

    @classmethod
    def replacing(cls, linear: nn.Linear, codes: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid):
        """The quantized form of `linear`, on its device and in its dtype."""
        device, dtype = linear.weight.device, linear.weight.dtype
        zero_point = None if zero_point is None else zero_point.to(device)
        layer = cls(codes.to(device), scale.to(device), zero_point, grid, linear.bias, dtype)
        copy_marks(linear, layer)
        return layer

    @classmethod
    def rounding(cls, linear: nn.Linear, scale: Tensor, zero_point: Tensor | None, grid: Grid):
        """`linear` with each weight rounded to the nearest level of the grid that `scale` and `zero_point` span."""
        codes = quantize(linear.weight.detach(), scale, zero_point, grid)
        return cls.replacing(linear, codes, scale, zero_point, grid)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_tokens is not None:
            x = fake_quantize_tokens(x, self.input_tokens)
        y = F.linear(x, self.weight, self.bias)
        return y if self.output_tokens is None else fake_quantize_tokens(y, self.output_tokens)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.grid}"
