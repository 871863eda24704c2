"""Uniform integer grids: choose the scales, quantize, dequantize. Pure functions on tensors, no modules.

A weight of shape (out, in) is cut into groups of `group_size` consecutive columns per row; per channel means one group
per row. Codes are always signed, `q_min = -2^(b-1) .. q_max = 2^(b-1) - 1`, and

    w ~ scale * (code - zero_point)

with zero_point = 0 on a symmetric grid. This is the convention of compressed-tensors, so codes go to disk as they are;
the papers' unsigned asymmetric grid `0 .. 2^b - 1` is the same grid shifted by 2^(b-1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the weights of one layer may lie. `group_size` None means one group per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    @property
    def q_min(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def width(self, in_features: int) -> int:
        """Columns per group. ValueError if the group size does not divide `in_features`."""
        if self.group_size is None:
            return in_features
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide a layer of {in_features} input columns")
        return self.group_size


NORM = 3.0  # as good as 2.4 and better than 2 or 4 on the tuning text, at half the time (reports/LOG.md)


@dataclass(frozen=True)
class ScaleSearch:
    """How the scale of a group is chosen.

    `minmax`: `scale = gamma * max|w| / q_max`; gamma, a number or one for each group (out, groups), is the scaling factor
    of Hasan (arXiv 2411.06084).
    `search`: the gamma of `GAMMAS` that minimises `sum importance * |w - w_q|^norm` over the group (norm 2.4 in the GPTQ
    code, 4 in LR-QAT's). All methods that start from rounding use one norm, so that they start from one grid.
    """

    kind: str = "minmax"
    gamma: float | Tensor = 1.0
    norm: float = NORM

    # 1.00, 0.98, ... 0.10. Long rows at 2 bits have their optimum below 0.30.
    GAMMAS = tuple(k / 50 for k in range(50, 4, -1))


def choose_scale(
    weight: Tensor, grid: Grid, search: ScaleSearch, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of each group of `weight` (out, in), both (out, groups); the zero point is None if symmetric.

    `importance` (in,) weighs the columns in the search, for example by the diagonal of a layer's Hessian. The scale is
    rounded to `grid.scale_dtype` before anything is derived from it: it is the number that will be stored.
    """
    groups = weight.float().unflatten(1, (-1, grid.width(weight.shape[1])))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if search.kind == "minmax":
        return _scale_of_range(search.gamma * low, search.gamma * high, grid)

    scale, zero_point = _scale_of_range(low, high, grid)
    weights = None if importance is None else importance.float().view(1, *groups.shape[1:])
    # Some rows at a time: all candidates at once would need many copies of the weight.
    rows = max(1, 2**20 // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        best = torch.full_like(low[part], torch.inf)
        for gamma in search.GAMMAS:
            s, z = _scale_of_range(gamma * low[part], gamma * high[part], grid)
            error = _group_error(groups[part], s, z, grid, search.norm, weights)
            better = error < best
            best = torch.where(better, error, best)
            scale[part] = torch.where(better, s, scale[part])
            if z is not None:
                zero_point[part] = torch.where(better, z, zero_point[part])
    return scale, zero_point


def _scale_of_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The grid that covers [low, high] (low <= 0 <= high) in each group."""
    if grid.symmetric:
        scale = torch.maximum(-low, high) / grid.q_max
    else:
        scale = (high - low) / (2**grid.bits - 1)
    # A group of zeros needs some positive scale; any gives codes of zero.
    scale = scale.to(grid.scale_dtype)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if grid.symmetric:
        return scale, None
    zero_point = (grid.q_min - torch.round(low / scale.float())).clamp(grid.q_min, grid.q_max)
    return scale, zero_point.to(torch.int8)


def _group_error(groups: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, norm: float, weights) -> Tensor:
    s = scale.float().unsqueeze(-1)
    z = 0 if zero_point is None else zero_point.float().unsqueeze(-1)
    error = (groups / s).round_().add_(z).clamp_(grid.q_min, grid.q_max).sub_(z).mul_(s).sub_(groups)
    if norm == 2:
        error.square_()
    elif norm == 3:
        error = error.square().mul_(error.abs_())
    elif norm == 4:
        error.square_().square_()
    else:
        error.abs_().pow_(norm)
    return (error if weights is None else error.mul_(weights)).sum(-1)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """Codes, int8, of `weight` (out, in): `clamp(round(w / scale) + zero_point, q_min, q_max)`."""
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    codes = torch.round(groups / scale.float().unsqueeze(-1))
    if zero_point is not None:
        codes += zero_point.unsqueeze(-1)
    return codes.clamp_(grid.q_min, grid.q_max).to(torch.int8).flatten(1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`scale * (codes - zero_point)` computed in `dtype`, as compressed-tensors does when it loads a checkpoint."""
    groups = codes.unflatten(1, (scale.shape[1], -1)).to(dtype)
    if zero_point is not None:
        groups = groups - zero_point.unsqueeze(-1).to(dtype)
    return (groups * scale.unsqueeze(-1).to(dtype)).flatten(1)
