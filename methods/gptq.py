"""GPTQ: round column by column and let the columns not yet rounded make up for the error (arXiv 2210.17323).

For a layer with weight W (out, in) and calibration inputs X (n, in) it lowers `||(W - W_q) X^T||^2` with the help of
`H = (2 / n) X^T X`. In the paper's Algorithm 1, for column j and the upper Cholesky factor U of `H^-1`:

    err = (w_j - q_j) / U_jj,      w_k <- w_k - err * U_jk   for the later columns k

Layers which share an input share H, so they are stacked by rows and solved once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from methods.core.formats.integer import Grid, ScaleSearch, choose_scale, dequantize
from methods.core.job.options import require_positive
from methods.core.job.registry import Method
from methods.core.job.runtime import device
from methods.core.model.layers import QuantizedLinear, residual
from methods.core.model.walk import quantize_blocks

METHOD = Method(
    "ptq",
    reads="calibration",
    paper={"damp": 0.01, "act_order": False, "static_groups": False, "true_sequential": False, "scale": "minmax"},
)


@dataclass(frozen=True)
class Config:
    damp: float = 0.01  # share of the mean diagonal of H that is added to it
    act_order: bool = True  # columns by descending diagonal of H
    static_groups: bool = True  # scales from the original weights, before any update
    true_sequential: bool = True  # inside a block, a layer's inputs come from the quantized layers before it
    block_size: int = 128  # columns updated at once; rounded up to whole groups
    batch_size: int = 4  # calibration sequences per forward pass
    scale: Literal["minmax", "search"] = "search"
    norm: float = 2.0  # with search: the error that is minimised, sum |w - w_q|^norm
    weighted: bool = True  # with search: weigh each column's error by its diagonal entry of H

    def __post_init__(self):
        require_positive(self, "damp", "block_size", "batch_size", "norm")


def check(scheme, config) -> None:
    """ValueError for a combination that no checkpoint format can store."""
    if config.act_order and not config.static_groups and scheme.weights.group_size is not None:
        raise ValueError("act_order with groups needs static_groups: otherwise a group's columns are not neighbours")


def apply(model, scheme, config, tokens, log):
    def replace(layers, hessian):
        grids = {name: scheme.grid(name, linear.in_features) for name, linear in layers.items()}
        replaced = {}
        for grid in dict.fromkeys(grids.values()):
            same = {name: linear for name, linear in layers.items() if grids[name] == grid}
            replaced |= _replace(same, hessian, grid, config, log)
        return replaced

    quantize_blocks(
        model,
        tokens,
        replace,
        batch_size=config.batch_size,
        sequential=config.true_sequential,
        device=device(),
        log=log,
    )
    return model


def _replace(layers, hessian: Tensor, grid: Grid, config: Config, log) -> dict[str, QuantizedLinear]:
    """The quantized forms of layers that share an input and a grid."""
    linears = list(layers.values())
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    result = solve(weight, hessian, grid, config)
    if result.damp > config.damp:
        log.departure(f"{', '.join(layers)}: damping raised from {config.damp:g} to {result.damp:g}")
    replaced = {}
    for (name, linear), rows in zip(layers.items(), _rows_of(linears), strict=True):
        parts = [None if t is None else t[rows].clone() for t in result.tensors]
        replaced[name] = QuantizedLinear.replacing(linear, *parts, grid)
        replaced[name].residual = result.residual[rows].cpu()  # not needed on the device again
        error, output = result.output_error[rows].sum(0).tolist()
        log.layer(name, damping=result.damp, output_error=error / output if output else 0.0)
    return replaced


def _rows_of(linears) -> list[slice]:
    ends = torch.tensor([m.out_features for m in linears]).cumsum(0).tolist()
    return [slice(end - m.out_features, end) for end, m in zip(ends, linears, strict=True)]


@dataclass(frozen=True)
class Solution:
    tensors: tuple[Tensor, Tensor, Tensor | None]  # codes (out, in), scale and zero point (out, groups)
    residual: Tensor  # (out, in) int8: what rounding took off each weight as it was then, not as it was at first
    damp: float  # the damping that was needed
    output_error: Tensor  # (out, 2): squared output error and squared output of each row


def solve(weight: Tensor, hessian: Tensor, grid: Grid, config: Config) -> Solution:
    """GPTQ for one layer: weight (out, in) fp32, hessian (in, in) fp32. With `hessian = I` the result is RTN's.

    ValueError if the Hessian is not finite, or not positive definite at any damping.
    """
    if not hessian.isfinite().all():
        raise ValueError("the Hessian is not finite: some calibration activation is infinite or NaN")
    original, measured, width = weight, hessian, grid.width(weight.shape[1])
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    hessian = hessian + torch.diag(dead.to(hessian))
    weight = weight.masked_fill(dead, 0)
    search = ScaleSearch(config.scale, norm=config.norm)
    importance = diagonal if config.weighted else None

    columns = len(diagonal)
    order = (
        diagonal.argsort(descending=True, stable=True)
        if config.act_order
        else torch.arange(columns, device=dead.device)
    )
    factor, damp = _inverse_factor(hessian[order][:, order], config.damp)
    static = config.static_groups or config.act_order or width == columns
    if static:
        scale, zero_point = choose_scale(weight, grid, search, importance)
    else:
        scale = weight.new_empty(weight.shape[0], columns // width, dtype=grid.scale_dtype)
        zero_point = None if grid.symmetric else torch.empty_like(scale, dtype=torch.int8)

    # Everything is transposed here: a column of W, and its groups' scales, are then contiguous.
    w = weight.T[order].contiguous()
    codes = torch.empty_like(w, dtype=torch.int8)
    left = torch.empty_like(codes)
    s, z = _transposed(scale, zero_point)
    group_of = (order // width).tolist()
    step = -(-config.block_size // width) * width if width < columns else config.block_size
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, errors = w[start:end], torch.empty_like(w[start:end])
        for j, group in enumerate(group_of[start:end]):
            column = start + j
            if not static and column % width == 0:
                now = slice(column, column + width)
                found = choose_scale(w[now].T, grid, search, None if importance is None else importance[now])
                for all_groups, this_group in zip((scale, zero_point), found, strict=True):
                    if all_groups is not None:
                        all_groups[:, group] = this_group[:, 0]
                s, z = _transposed(scale, zero_point)
            steps = block[j] / s[group]
            code = torch.round(steps).add_(z[group]).clamp_(grid.q_min, grid.q_max)
            codes[column] = code
            code.sub_(z[group])
            left[column] = residual(steps, code)
            errors[j] = (block[j] - code.mul_(s[group])) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    codes, left = (t[order.argsort()].T.contiguous() for t in (codes, left))
    error = _output_error(original, codes, scale, zero_point, measured)
    return Solution((codes, scale, zero_point), left, damp, error)


def _transposed(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
    """fp32 scales and zero points, (groups, out), zeros for a symmetric grid."""
    s = scale.T.float().contiguous()
    return s, torch.zeros_like(s) if zero_point is None else zero_point.T.float().contiguous()


def _inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper Cholesky factor U of `(H + damp * mean(diag H) * I)^-1`, so `U^T U = H^-1`, and the damping used.

    With the columns reversed, `H = R R^T` for an upper R, and U is the inverse of R: one factorization and one triangular
    solve. If H is not positive definite, the damping is raised tenfold until it is.
    """
    identity = torch.eye(len(hessian), device=hessian.device)
    mean = hessian.diagonal().mean()
    while damp < 1e4:
        lower, info = torch.linalg.cholesky_ex((hessian + damp * mean * identity).flip(0, 1))
        if info == 0:
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), damp
        damp *= 10
    raise ValueError("the Hessian is not positive definite at any damping")


def _output_error(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, hessian: Tensor) -> Tensor:
    difference = weight - dequantize(codes, scale, zero_point, torch.float32)
    return torch.stack([((m @ hessian) * m).sum(1) for m in (difference, weight)], dim=1)
