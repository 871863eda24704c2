"""Ways to choose the scales of a weight's groups: from their range, or by search. Pure functions of tensors."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from methods.core.formats import Format, Rounded, per_group
from methods.core.job.options import NORM, ScaleOptions

# 1.00, 0.98, ... 0.10. Long rows at 2 bits have their optimum below 0.30.
GAMMAS = tuple(k / 50 for k in range(50, 4, -1))


@dataclass(frozen=True)
class ScaleSearch:
    """How the scale of a group is chosen.

    `minmax`: the scale that covers `gamma` times the group's range; gamma, a number or one for each group (out, groups), is
    the scaling factor of Hasan (arXiv 2411.06084). Where it is negative, so is the scale.
    `search`: the gamma of `GAMMAS` that minimizes `sum importance * |w - w_q|^norm` over the group (norm 2.4 in the GPTQ
    code, 4 in LR-QAT's), and the sign: of the levels -4 to 3 the one more goes to the side that needs it, as in AutoRound's
    package and llama.cpp. All methods that start from rounding use one norm, so that they start from one grid.
    `hqq`: half-quadratic scale and zero point, see `_half_quadratic`; the sign is that of the longer side.
    """

    kind: str = "minmax"
    gamma: float | Tensor = 1.0
    norm: float = NORM

    @classmethod
    def of(cls, options: ScaleOptions) -> ScaleSearch:
        """As a method's options say."""
        return cls(options.scale, options.gamma, options.norm)

    def __post_init__(self):
        if self.kind not in ("minmax", "search", "hqq"):
            raise ValueError(f"a scale is chosen by minmax, search or hqq, not by {self.kind!r}")


def choose_scale(
    weight: Tensor, format: Format, search: ScaleSearch, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group of `weight` (out, in), both (out, groups); the zero point is None if symmetric.

    `importance` (in,) weighs the columns in the search, for example by the diagonal of a layer's Hessian. The scale is
    rounded as the format stores it before anything is derived from it.
    """
    groups = weight.float().unflatten(1, (-1, format.width(weight.shape[1])))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if search.kind == "minmax":
        gamma = torch.as_tensor(search.gamma)
        scale, zero_point = format.scale_of_range(gamma.abs() * low, gamma.abs() * high)
        return scale * gamma.sign().to(scale.dtype), zero_point

    scale, zero_point = format.scale_of_range(low, high)
    signs = [sign.to(scale.dtype) for sign in format.signs(low, high)]
    weights = None if importance is None else importance.float().view(1, *groups.shape[1:])
    if search.kind == "hqq":
        scale, zero_point = _half_quadratic(groups * per_group(signs[0]), scale, zero_point, format, weights)
        return scale * signs[0], zero_point
    # Some rows at a time: all candidates at once would need many copies of the weight.
    rows = max(1, 2**20 // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        best = torch.full_like(low[part], torch.inf)
        for sign, gamma in itertools.product(signs, GAMMAS):
            s, z = format.scale_of_range(gamma * low[part], gamma * high[part])
            s = s * sign[part]
            error = _group_error(groups[part], s, z, format, search.norm, weights)
            better = error < best
            best = torch.where(better, error, best)
            scale[part] = torch.where(better, s, scale[part])
            if z is not None:
                zero_point[part] = torch.where(better, z, zero_point[part])
    return scale, zero_point


def rounded_to_nearest(weight: Tensor, format: Format, search: ScaleSearch) -> Rounded:
    """A weight (out, in) at the nearest levels, with the scales that `search` gives."""
    return format.quantize(weight, *choose_scale(weight, format, search))


def share_of_range(weight: Tensor, format: Format, search: ScaleSearch) -> Tensor:
    """What share of each group's range the scale that `search` gives covers, (out, groups), fp32; negative where that is."""
    chosen, _ = choose_scale(weight, format, search)
    whole, _ = choose_scale(weight, dataclasses.replace(format, scale_dtype=torch.float32), ScaleSearch("minmax"))
    return chosen.float() / whole


def _half_quadratic(
    groups: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point (out, groups) that make the l_p norm of the error small, p = 0.7, from those given (HQQ, Badri and
    Shaji 2023): few large errors for many small ones.

    The error in steps is split into a sparse part e, which is set aside, and the rest, whose square is minimized in turn:

        e <- sign(r) max(|r| - |r|^(p - 1) / beta, 0),      r = w / s - level,      beta = 10, then 1.01 times that, ...
        z <- mean(code - w / s + e),      s <- the least-squares fit of w - s e to the levels

    HQQ fits the zero point only and stores it as a float; here it is an integer, so the scale is fitted too, and symmetric
    formats have one to fit. Kept is the best of the rounds.
    """
    norm, beta, rounds = 0.7, 10.0, 20
    s, z = scale, zero_point
    best = torch.full(scale.shape, torch.inf, device=scale.device)
    for _ in range(rounds):
        steps, shift = groups / per_group(s), per_group(z)
        levels = format.snap_(steps.clone(), shift)
        rest = steps - levels
        error = (rest * per_group(s)).abs().pow(norm)
        error = (error if weights is None else error * weights).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, s, scale)
        size = rest.abs()
        sparse = rest.sign() * (size - size.pow(norm - 1) / beta).clamp(min=0)
        if z is not None:
            zero_point = torch.where(better, z, zero_point)
            end = 2 ** (format.bits - 1)
            z = (levels + shift - steps + sparse).mean(-1).round().clamp(-end, end - 1).to(torch.int8)
        wanted = groups - sparse * per_group(s)
        fit = levels if weights is None else levels * weights
        s = format.positive((fit * wanted).sum(-1) / (fit * levels).sum(-1).clamp(min=1e-12))
        beta *= 1.01
    return scale, zero_point


def _group_error(
    groups: Tensor, scale: Tensor, zero_point: Tensor | None, format: Format, norm: float, weights: Tensor | None
) -> Tensor:
    s = per_group(scale)
    error = format.snap_(groups / s, per_group(zero_point)).mul_(s).sub_(groups)
    if norm == 2:
        error.square_()
    elif norm == 3:
        error = error.square().mul_(error.abs_())
    elif norm == 4:
        error.square_().square_()
    else:
        error.abs_().pow_(norm)
    return (error if weights is None else error.mul_(weights)).sum(-1)
