"""The quantized linear layer that every method leaves behind: codes, scales, zero points."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.formats import Packed, Rounded
from methods.core.model.activations import copy_marks, fake_quantize_tokens
from methods.core.scheme import TokenScheme

RESIDUAL_STEPS = 256  # of a residual to a step of the grid
# Weights of a model whose quantized layers keep what their codes stand for, which takes two bytes or more each. In a larger
# one a layer computes it when it is needed, so that a model of 4 bits needs less memory than in full precision.
LARGEST_EXPANDED = 16e9


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

    It has what a checkpoint stores: packed codes (out, words of 32 bits); scale and zero_point (out, groups), zero_point int8
    or None; bias (out,) or None. `weight` is the dequantized matrix in `dtype`, in which the model computes: derived, never
    stored. A layer that is made of codes keeps it; one that is made of packed codes computes it each time, unless it was told
    to `expand`. `input_tokens` and `output_tokens` say how the layer quantizes what it receives and what it returns, token by
    token; None for not at all.

    `residual` (out, in) int8, of a method that changes weights before it rounds them: what the rounding took off, in 256ths
    of a step. A training that starts from the layer needs it; the layer itself does not, nor does an evaluation.
    """

    input_tokens: TokenScheme | None = None
    output_tokens: TokenScheme | None = None
    residual: Tensor | None = None

    def __init__(self, rounded: Rounded | Packed, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        packed = rounded if isinstance(rounded, Packed) else rounded.packed()
        self.format, self.dtype = packed.format, dtype
        self.out_features, self.in_features = packed.shape
        self.register_buffer("packed", packed.words)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero_point", packed.zero_point)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("expanded", None, persistent=False)
        if isinstance(rounded, Rounded):
            self.expanded = Rounded(rounded.codes, self.scale, self.zero_point, self.format).value(dtype)

    @classmethod
    def replacing(cls, linear: nn.Linear, rounded: Rounded | Packed):
        """The quantized form of `linear`, on its device and in its dtype."""
        layer = cls(rounded, linear.bias, linear.weight.dtype).to(linear.weight.device)
        copy_marks(linear, layer)
        return layer

    def rounded(self) -> Rounded:
        """The weight as codes."""
        shape = torch.Size((self.out_features, self.in_features))
        return Packed(self.packed, shape, self.scale, self.zero_point, self.format).rounded()

    def expand(self) -> None:
        """Keep the weight from now on."""
        self.expanded = self.weight

    def pack(self) -> None:
        """Compute the weight each time from now on."""
        self.expanded = None

    @property
    def weight(self) -> Tensor:
        """What the codes stand for (out, in)."""
        return self.rounded().value(self.dtype) if self.expanded is None else self.expanded

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


def weights_of(layers: Iterable[nn.Module]) -> int:
    """How many weights linear layers, quantized or not, have in all."""
    return sum(layer.out_features * layer.in_features for layer in layers)


def are_large(layers: Iterable[nn.Module]) -> bool:
    """Whether the linear layers of a model stay packed once they are quantized."""
    return weights_of(layers) > LARGEST_EXPANDED
