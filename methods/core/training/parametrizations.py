"""Parametrizations: the weight of a layer as a function of what is trained, and the parts that they are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.formats import Format, Rounded, grouped, in_steps, per_group
from methods.core.job.options import ScaleOptions
from methods.core.model.layers import QuantizedLinear, quantized_layers, residual_steps
from methods.core.scales import ScaleSearch, choose_scale, rounded_to_nearest, share_of_range
from methods.core.training.sharding import frozen


class Parametrization(nn.Module):
    """The weight of one layer as a function of trained parameters."""

    format: Format

    def forward(self) -> Tensor:
        """The fake-quantized weight (out, in), fp32, through which gradients reach the parameters."""
        raise NotImplementedError

    def rounded(self) -> Rounded:
        """That weight as codes."""
        raise NotImplementedError


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


def snap(steps: Tensor, form: Format, zero_point: Tensor | None = None) -> Tensor:
    """The nearest levels of a format, with the straight-through gradient inside its range."""
    return form.clip(straight_through(steps, form.round), zero_point)


@dataclass(frozen=True)
class Start:
    """What a layer's training starts from: its rounded weight, the weight (out, in) before it was rounded, and this in steps,
    fp32: `levels = clip(round(steps))`."""

    rounded: Rounded
    weight: Tensor
    steps: Tensor


def start_of(linear: nn.Module, form: Format, search: ScaleSearch) -> Start:
    """The start of a layer: its weight rounded with the scales that `search` gives, or, of a layer that the step before has
    quantized, its codes, scales and what there was before rounding (`QuantizedLinear.residual`)."""
    if isinstance(linear, QuantizedLinear):
        rounded = linear.rounded()
        steps = rounded.levels(torch.float32).flatten(1)
        if linear.residual is not None:
            steps = steps + residual_steps(linear.residual.to(steps.device))
        scale = rounded.scale.float()
        return Start(rounded, (grouped(steps, scale) * per_group(scale)).flatten(1), steps)
    weight = linear.weight.detach()
    scale, zero_point = choose_scale(weight, form, search)
    return Start(form.quantize(weight, scale, zero_point), weight, in_steps(weight, scale).flatten(1))


def kind_of_start(model: nn.Module) -> str:
    """What rates go by: "codes" of another method, which were chosen by data, so that there is less to win and more to lose;
    or "rounding"."""
    return "codes" if quantized_layers(model) else "rounding"


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


class RelativeScale(nn.Module):
    """`s = s_0 exp(t)` per group, t zero at the start: a learning rate is then a relative change of the scale, the same at
    any number of bits and for any model, and a scale cannot change its sign."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.start = frozen(start.float())
        self.log_ratio = nn.Parameter(torch.zeros_like(start, dtype=torch.float32))

    def forward(self) -> Tensor:
        """The scale (out, groups), fp32."""
        return self.start * self.log_ratio.exp()


def rms(weight: Tensor) -> float:
    """Root mean square of a weight: what the rates of parameters that are in units of the weight are relative to."""
    return float(weight.detach().float().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny))


def spread(weight: Tensor) -> float:
    """`rms(weight) * sqrt(in)`: about 1 for the usual initialization, whatever the width."""
    return rms(weight) * math.sqrt(weight.shape[1])


class FullWeight(Parametrization):
    """All weights trained, in steps of the grid that they start on: `w = s_0 u`, and

        W_hat = s clip(round(w / s)),      s = s_0 exp(t)

    so that the rate of u means the same at any number of bits and for any model. The gradient passes to u inside the range,
    and to t, if it is trained, as in LSQ (Esser et al., arXiv 1902.08153, eq. 3 and 5): with v = w / s,

        dW_hat / ds = round(v) - v inside the range, and the level at its end outside,

    divided by sqrt(weights per scale * largest level). In LSQ v is limited to the range and then rounded; with `limit_first`
    false it is rounded first, and what rounds to the outermost level counts as inside.
    """

    def __init__(self, linear: nn.Module, form: Format, search: ScaleSearch, learned: bool, limit_first: bool = True):
        super().__init__()
        self.format, self.limit_first = form, limit_first
        start = start_of(linear, form, search)
        self.steps = nn.Parameter(start.steps)
        self.start = frozen(start.rounded.scale.float())
        self.register_buffer("zero_point", start.rounded.zero_point)
        self.log_ratio = nn.Parameter(torch.zeros_like(start.rounded.scale, dtype=torch.float32), requires_grad=learned)
        largest = form.clip(torch.tensor(torch.inf)).item()
        self.gradient_scale = (form.width(self.steps.shape[1]) * largest) ** -0.5

    def _weight(self) -> tuple[Tensor, Tensor]:
        """Levels (out, groups, columns per group) and scale (out, groups), fp32."""
        ratio = scale_gradient(self.log_ratio, self.gradient_scale)
        steps = grouped(self.steps, self.start) * per_group((-ratio).exp())
        zero_point = per_group(self.zero_point)
        if self.limit_first:
            steps = self.format.limit(steps, zero_point)
        return snap(steps, self.format, zero_point), self.start * ratio.exp()

    def forward(self) -> Tensor:
        levels, scale = self._weight()
        return (levels * per_group(scale)).flatten(1)

    def rounded(self) -> Rounded:
        levels, scale = self._weight()
        codes = self.format.encode(levels.detach(), per_group(self.zero_point)).flatten(1)
        return Rounded(codes, scale.detach(), self.zero_point, self.format)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return gradient * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`; backward, the gradient times `factor`."""
    return _ScaleGradient.apply(x, factor)


class Recomputed(Parametrization):
    """All weights (out, in) trained; each forward pass rounds them as they are by then, at scales of their range by then.

    The gradient passes straight through. With a search each group keeps the share of its range that is best before training.
    """

    def __init__(self, weight: Tensor, form: Format, config: ScaleOptions):
        super().__init__()
        self.format = form
        self.weight = nn.Parameter(weight.float().clone())
        self.gamma = config.gamma
        if config.scale != "minmax":
            self.gamma = share_of_range(weight, form, ScaleSearch.of(config))

    def step(self) -> float:
        """The mean step of the grid, over groups that are not all zeros."""
        scale = self._round(self.weight.detach()).scale.float().abs()
        used = grouped(self.weight.detach(), scale).abs().amax(-1) > 0
        return float(scale[used].mean()) if used.any() else 1.0

    def forward(self) -> Tensor:
        return straight_through(self.weight, lambda w: self._round(w).value(torch.float32))

    def rounded(self) -> Rounded:
        return self._round(self.weight.detach())

    def _round(self, weight: Tensor) -> Rounded:
        return rounded_to_nearest(weight, self.format, ScaleSearch("minmax", self.gamma))
