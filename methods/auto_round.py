"""AutoRound: which way each weight is rounded, and the range of each group, by signed gradient descent (arXiv 2309.05516).

    W_hat = s clip(round(W / s + V)),      s the scale of the range [beta min(W), alpha max(W)]

V (out, in) is within [-1/2, 1/2] and zero at the start; alpha and beta, one per group, are at most 1. They are trained block
by block for the squared error of the block's output, in steps of the sign of the gradient, with a rate that falls linearly
to zero; the best step is kept. As in the second version (arXiv 2512.04746) the range starts where a search has found it best;
`scale: minmax` starts at the whole range, as in the first. Half of the loss counts each token's error relative to its own
size, where the first version sums over all and the package of the second leaves out the largest 0.1 % of the differences;
that one also weighs the search by activations, and has a scale of up to twice the one that was found.

Zero steps are rounding to nearest (on asymmetric grids up to zero points near a tie). The default is the paper's number of
steps; the packages call 50 a light recipe. V is in units of s, so on a grid with uneven levels, such as e2m1, it is not half
of each spacing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from methods.core.formats import Format, Rounded, grouped, in_steps, per_group
from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, require_between, require_positive
from methods.core.job.registry import Held, Method
from methods.core.scales import ScaleSearch, share_of_range
from methods.core.scheme import Scheme
from methods.core.training.layers import quantized_by
from methods.core.training.loop import Schedule
from methods.core.training.parametrizations import Parametrization, snap, straight_through
from methods.core.training.reconstruction import reconstruct

METHOD = Method("ptq", reads="calibration", differentiates=True)
LEAST_SHARE = 0.1  # of its range that a group may keep


@dataclass(frozen=True)
class Config(ScaleOptions):
    steps: int = 200  # of each block
    batch_size: int = 8  # calibration sequences of a step
    rate: float | None = None  # of V, alpha and beta; None: 1 / steps, with which a V can just reach its bound

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "batch_size")
        require_between(self, 1e-9, 1, "rate")
        if self.steps < 0:
            raise ValueError(f"steps is {self.steps}; it must be zero or more")


def check(scheme: Scheme, config: Config) -> None:
    """ValueError for a zero point that no range has."""
    if config.scale == "hqq" and not scheme.weights.symmetric:
        raise ValueError("scale: hqq fits zero points, and AutoRound's are those of a range; choose search or minmax")


def held(config: Config, samples: int) -> Held:
    return Held(trained=1, blockwise=True, streams=2, rounds=config.steps * config.batch_size / samples)


def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    rate = config.rate or 1 / max(1, config.steps)
    reconstruct(
        model,
        quantized_by(scheme, lambda linear, form: Rounding(linear.weight.detach(), form, ScaleSearch.of(config))),
        lambda weight: [
            {"params": [weight.offset], "lr": rate, "bounds": (-0.5, 0.5)},
            {"params": [weight.low_share, weight.high_share], "lr": rate, "bounds": (LEAST_SHARE, 1.0)},
        ],
        SignedDescent,
        tokens,
        steps=config.steps,
        batch_size=config.batch_size,
        schedule=Schedule("linear", warm_up=0.0),
        keep_best=True,
        log=log,
    )
    return model


class Rounding(Parametrization):
    """The weight of one layer (out, in) as AutoRound trains it."""

    def __init__(self, weight: Tensor, form: Format, search: ScaleSearch):
        super().__init__()
        self.format = form
        self.register_buffer("weight", weight)
        groups = weight.float().unflatten(1, (-1, form.width(weight.shape[1])))
        self.register_buffer("low", groups.amin(-1).clamp(max=0))
        self.register_buffer("high", groups.amax(-1).clamp(min=0))
        share = share_of_range(weight, form, search)
        self.offset = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
        self.register_buffer("direction", share.sign())
        self.low_share, self.high_share = nn.Parameter(share.abs()), nn.Parameter(share.abs())

    def _weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Levels (out, groups, columns per group), fp32; scale and zero point (out, groups)."""
        low = self.low_share * self.low
        scale, zero_point = self.format.scale_of_range(low, self.high_share * self.high)
        scale = scale * self.direction.to(scale.dtype)
        steps = in_steps(self.weight, scale) + grouped(self.offset, scale)
        shift = None  # the zero point, with the gradient of what was rounded to it
        if zero_point is not None:
            shift = per_group(straight_through(-low / scale.float(), lambda _: zero_point.float()))
        return snap(steps, self.format, shift), scale, zero_point

    def forward(self) -> Tensor:
        levels, scale, _ = self._weight()
        return (levels * per_group(scale)).flatten(1)

    @torch.no_grad()
    def rounded(self) -> Rounded:
        levels, scale, zero_point = self._weight()
        return Rounded(self.format.encode(levels, per_group(zero_point)).flatten(1), scale, zero_point, self.format)


class SignedDescent(torch.optim.Optimizer):
    """`p <- p - rate sign(gradient)`, within the bounds of its group."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad.sign(), alpha=group["lr"]).clamp_(*group["bounds"])
