"""The quantized linear layer that every method leaves behind: codes, scales, zero points."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.formats import Rounded
from methods.core.model.activations import copy_marks, fake_quantize_tokens
from methods.core.scheme import TokenScheme

RESIDUAL_STEPS = 256  # of a residual to a step of the grid


def residual(steps: Tensor, levels: Tensor) -> Tensor:
    """What rounding `steps` to `levels` took off, int8 in 256ths of a step; where it clipped, half a step at most.

    Rounding to nearest leaves up to half a step; 127 keeps what is left on its side of the boundary.
    """
    return ((steps - levels) * RESIDUAL_STEPS).round().clamp(-127, 127).to(torch.int8)


def residual_steps(residual: Tensor) -> Tensor:
    """A residual in steps of the grid, fp32."""
    return residual.float() / RESIDUAL_STEPS


class QuantizedLinear(nn.Module):
    """A linear layer with a rounded weight: `y = x W_q^T + b`.

    codes (out, in) int8; scale and zero_point (out, groups), zero_point int8 or None; bias (out,) or None. `weight` is
    the dequantized matrix in the dtype the model computes in: derived, never stored, and so the layer needs more memory than
    an ordinary one. `input_tokens` and `output_tokens` say how the layer quantizes what it receives and what it returns,
    token by token; None for not at all.

    `residual` (out, in) int8, of a method that changes weights before it rounds them: what the rounding took off, in 256ths
    of a step. A training that starts from the layer needs it; the layer itself does not, nor does an evaluation.
    """

    input_tokens: TokenScheme | None = None
    output_tokens: TokenScheme | None = None
    residual: Tensor | None = None

    def __init__(self, rounded: Rounded, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.format = rounded.format
        self.out_features, self.in_features = rounded.codes.shape
        self.register_buffer("codes", rounded.codes)
        self.register_buffer("scale", rounded.format.stored_scale(rounded.scale))
        self.register_buffer("zero_point", rounded.zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("weight", self.rounded().value(dtype), persistent=False)

    @classmethod
    def replacing(cls, linear: nn.Linear, rounded: Rounded):
        """The quantized form of `linear`, on its device and in its dtype."""
        layer = cls(rounded.to(linear.weight.device), linear.bias, linear.weight.dtype)
        copy_marks(linear, layer)
        return layer

    def rounded(self) -> Rounded:
        """The weight as codes."""
        return Rounded(self.codes, self.scale, self.zero_point, self.format)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_tokens is not None:
            x = fake_quantize_tokens(x, self.input_tokens)
        y = F.linear(x, self.weight, self.bias)
        return y if self.output_tokens is None else fake_quantize_tokens(y, self.output_tokens)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
