"""Linear layers whose quantized weight is a function of trained parameters: what QAT methods put in place to train.

A method gives the function as a module, a *parametrization*; this file puts it into the model, recomputes it in the
backward pass, quantizes the layer's tokens with a straight-through gradient, and folds it into integers afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods.core.formats.integer import Grid, ScaleSearch, choose_scale
from methods.core.formats.integer import quantize as to_codes
from methods.core.job.log import RunLog
from methods.core.job.runtime import device
from methods.core.model.activations import copy_marks, fake_quantize_tokens
from methods.core.model.anatomy import block_linears, replace_module
from methods.core.model.layers import QuantizedLinear, residual_steps
from methods.core.training.loop import sample

MOVED_FAR = 0.5  # relative change of a scale that a short training should not make


class Parametrization(nn.Module):
    """The weight of one layer as a function of trained parameters."""

    grid: Grid

    def forward(self) -> Tensor:
        """The fake-quantized weight (out, in), fp32, through which gradients reach the parameters."""
        raise NotImplementedError

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes (out, in), scale and zero point (out, groups) of that weight."""
        raise NotImplementedError


class LowRankTerm(nn.Module):
    """`(alpha / r) A B` with A (out, r) zero and B (r, in) Kaiming-uniform at the start, fp32, as in LoRA.

    (LoRA's own paper calls the zero one B and the other A; here they are named as in LR-QAT and DL-QAT.)

    `unit` is what the term is measured in, so that a learning rate means the same whatever the model: 1 where `base` is in
    steps of the grid, `spread(weight)` where it is the weight itself.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, unit: float = 1.0):
        super().__init__()
        self.factor = unit * alpha / rank
        self.a = nn.Parameter(weight.new_zeros(weight.shape[0], rank, dtype=torch.float32))
        self.b = nn.Parameter(weight.new_empty(rank, weight.shape[1], dtype=torch.float32))
        nn.init.kaiming_uniform_(self.b, a=math.sqrt(5))

    def forward(self, base: Tensor) -> Tensor:
        """`base` (out, in) with the term added, fp32."""
        return torch.addmm(base.float(), self.a, self.b, alpha=self.factor)


class TrainedLinear(nn.Module):
    """A linear layer with a parametrized weight, which is computed again in the backward pass: between the two passes no
    (out, in) intermediate of it is kept. LR-QAT's paper calls this gradient checkpointing."""

    def __init__(self, linear: nn.Linear, parametrization: Parametrization):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.parametrization = parametrization
        self.bias = linear.bias
        copy_marks(linear, self)
        with torch.no_grad():
            codes, self.first_scale, _ = parametrization.integers()
            self.first_codes = sample(codes)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_tokens is not None:
            x = straight_through(x, lambda v: fake_quantize_tokens(v, self.input_tokens))
        y = _RecomputedLinear.apply(x, self.bias, self.parametrization, *trained(self.parametrization))
        if self.output_tokens is not None:
            y = straight_through(y, lambda v: fake_quantize_tokens(v, self.output_tokens))
        return y


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module that receive gradients."""
    return [p for p in module.parameters() if p.requires_grad]


class _RecomputedLinear(torch.autograd.Function):
    """`x W^T + b`. Unlike torch.utils.checkpoint around the layer it recomputes W only, not the product."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, parametrization: Parametrization, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.parametrization, ctx.parameters = parametrization, parameters
        return F.linear(x, parametrization().to(x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            weight = ctx.parametrization()
        weight_gradient = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        parts = torch.autograd.grad(weight, ctx.parameters, weight_gradient.to(weight.dtype))
        return gradient @ weight.detach().to(x.dtype), None, None, *parts


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient, None


def straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function(x)`, exactly; backward, the gradient as if it were x (the straight-through estimator)."""
    return _StraightThrough.apply(x, function)


def round_ste(x: Tensor) -> Tensor:
    """Rounding with the straight-through gradient."""
    return straight_through(x, torch.round)


@dataclass(frozen=True)
class Start:
    """What a layer's training starts from: codes (out, in) int8, scale and zero point (out, groups), and the weight (out, in)
    fp32 before it was rounded, in steps of the grid: `codes = clamp(round(steps) + zero_point)`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    steps: Tensor


def start_of(linear: nn.Module, grid: Grid, search: ScaleSearch) -> Start:
    """The start of a layer: its weight rounded with the scales that `search` finds, or, of a layer that is quantized already
    (`init_from`), its codes, scales and what its method had before it rounded (`QuantizedLinear.residual`)."""
    if isinstance(linear, QuantizedLinear):
        codes, scale, zero_point = linear.codes, linear.scale, linear.zero_point
        steps = (
            codes.float()
            if zero_point is None
            else (grouped(codes.float(), scale) - zero_point.unsqueeze(-1)).flatten(1)
        )
        return Start(
            codes,
            scale,
            zero_point,
            steps if linear.residual is None else steps + residual_steps(linear.residual.to(steps.device)),
        )
    weight = linear.weight.detach()
    scale, zero_point = choose_scale(weight, grid, search)
    codes = to_codes(weight, scale, zero_point, grid)
    return Start(codes, scale, zero_point, (grouped(weight.float(), scale) / scale.float().unsqueeze(-1)).flatten(1))


class RelativeScale(nn.Module):
    """`s = s_0 exp(t)` per group, t zero at the start: a learning rate is then a relative change of the scale, the same at
    any number of bits and for any model, and a scale cannot change its sign."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.register_buffer("start", start.float())
        self.log_ratio = nn.Parameter(torch.zeros_like(self.start))

    def forward(self) -> Tensor:
        """The scale (out, groups), fp32."""
        return self.start * self.log_ratio.exp()


def rms(weight: Tensor) -> float:
    """Root mean square of a weight: what the rates of parameters that are in units of the weight are relative to."""
    return float(weight.detach().float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))


def spread(weight: Tensor) -> float:
    """`rms(weight) * sqrt(in)`: about 1 for the usual initialization, whatever the width."""
    return rms(weight) * math.sqrt(weight.shape[1])


def insert(model: nn.Module, make: Callable[[str, nn.Module], Parametrization]) -> list[Parametrization]:
    """Put a trained layer in place of every linear layer of the decoder blocks; their parametrizations, in order.

    Layer by layer on the device, the rest of the model afterwards: so the full-precision weights are never all there.
    """
    for name in list(block_linears(model)):
        linear = model.get_submodule(name).to(device())
        replace_module(model, name, TrainedLinear(linear, make(name, linear)))
    model.to(device())
    return [layer.parametrization for _, layer in trained_layers(model)]


def trained_layers(model: nn.Module) -> Iterator[tuple[str, TrainedLinear]]:
    yield from [(name, m) for name, m in model.named_modules() if isinstance(m, TrainedLinear)]


def fold(model: nn.Module, log: RunLog) -> None:
    """Replace every trained layer by the integers of its weight: nothing of the training is left.

    Logs for each layer the share of codes that are not those of step 0, `codes_changed`; it is what training did to the
    rounding, while every trained parameter moves a little. A departure names how many scales moved by more than half.
    """
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        for name, layer in trained_layers(model):
            codes, scale, zero_point = layer.parametrization.integers()
            log.layer(name, codes_changed=(sample(codes) != layer.first_codes).float().mean().item())
            ratio = scale.float() / layer.first_scale.float()
            if far := int(((ratio - 1).abs() > MOVED_FAR).sum()):
                lost = int((ratio <= 0).sum())
                log.departure(
                    f"{name}: training moved {far} of {scale.numel()} scales by more than half"
                    + (f", {lost} of them to zero or below" if lost else "")
                )
            new = QuantizedLinear(codes, scale, zero_point, layer.parametrization.grid, layer.bias, dtype)
            copy_marks(layer, new)
            replace_module(model, name, new)


def grouped(weight: Tensor, scale: Tensor) -> Tensor:
    """A view (out, groups, columns per group) of a weight (out, in) whose scale is (out, groups)."""
    return weight.unflatten(1, (scale.shape[1], -1))
