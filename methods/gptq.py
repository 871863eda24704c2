"""GPTQ: round column by column and let the columns not yet rounded make up for the error (arXiv 2210.17323).

For a layer with weight W (out, in) and calibration inputs X (n, in), GPTQ minimizes `||(W - W_q) X^T||^2`, using
`H = (2 / n) X^T X`. In the paper's Algorithm 1, for column j and the upper Cholesky factor U of `H^-1`:

    err = (w_j - q_j) / U_jj,      w_k <- w_k - err * U_jk   for the later columns k

Layers which share an input share H, so they are stacked by rows and solved once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from methods.core.formats import Format, Rounded
from methods.core.job.log import RunLog
from methods.core.job.options import ScaleOptions, require_positive
from methods.core.job.registry import Method
from methods.core.job.runtime import device
from methods.core.model.hessian import Hessian
from methods.core.model.layers import QuantizedLinear, residual
from methods.core.model.walk import walk
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme

METHOD = Method(
    "ptq",
    reads="calibration",
    paper={"damp": 0.01, "act_order": False, "static_groups": False, "true_sequential": False, "scale": "minmax"},
)


@dataclass(frozen=True)
class Config(ScaleOptions):
    damp: float = 0.01  # share of the mean diagonal of H that is added to it
    act_order: bool = True  # columns by descending diagonal of H
    static_groups: bool = True  # scales from the original weights, before any update
    true_sequential: bool = True  # inside a block, a layer's inputs come from the quantized layers before it
    block_size: int = 128  # columns updated at once; rounded up to whole groups
    batch_size: int = 4  # calibration sequences per forward pass
    norm: float = 2.0
    weighted: bool = True  # with search: weigh each column's error by its diagonal entry of H

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "damp", "block_size", "batch_size")


def check(scheme, config) -> None:
    """ValueError for a combination that our checkpoint format cannot store."""
    if config.act_order and not config.static_groups and scheme.weights.group_size is not None:
        raise ValueError("act_order with groups needs static_groups: otherwise a group's columns are not neighbors")


@torch.no_grad()
def apply(model: nn.Module, scheme: Scheme, config: Config, tokens: Tensor | None, log: RunLog) -> nn.Module:
    blocks = walk(
        model,
        tokens,
        batch_size=config.batch_size,
        sequential=config.true_sequential,
        device=device(),
        log=log,
    )
    for block in blocks:
        for stage in block:
            leader = next(iter(stage.layers.values()))
            with log.timer("hessian"):
                hessian = Hessian(leader.in_features, leader.weight.device)
                for x in stage.inputs:
                    hessian.add(x)
            # One format for all, unless an allocation gives layers of one input different bits.
            formats: dict[Format, dict[str, nn.Linear]] = {}
            for name, linear in stage.layers.items():
                formats.setdefault(scheme.number_format(name, linear.in_features), {})[name] = linear
            with log.timer("solve"):
                for form, layers in formats.items():
                    stage.replace(quantized_together(layers, hessian.value(), form, config, log))
    return model


def quantized_together(layers, hessian: Tensor, form: Format, config: Config, log) -> dict[str, QuantizedLinear]:
    """The quantized forms of layers that share an input, solved as one weight."""
    linears = list(layers.values())
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    solution = solve(weight, hessian, form, config)
    if solution.damp > config.damp:
        log.departure(f"{', '.join(layers)}: damping raised from {config.damp:g} to {solution.damp:g}")
    ends = list(accumulate(linear.out_features for linear in linears))
    quantized = {}
    for (name, linear), end in zip(layers.items(), ends, strict=True):
        rows = slice(end - linear.out_features, end)
        quantized[name] = QuantizedLinear.replacing(linear, solution.rounded.rows(rows))
        quantized[name].residual = solution.residual[rows].cpu()  # not needed on the device again
        error, output = solution.squared_error[rows].sum().item(), solution.squared_output[rows].sum().item()
        log.layer(name, damping=solution.damp, output_error=error / output if output else 0.0)
    return quantized


@dataclass(frozen=True)
class Solution:
    rounded: Rounded
    residual: Tensor  # (out, in) int8: what rounding took off each weight as it was then, not as it was at first
    damp: float  # the damping that was needed
    squared_error: Tensor  # (out,): `||(w - w_q) X^T||^2` of each row, up to the factor 2 / n
    squared_output: Tensor  # (out,): `||w X^T||^2` likewise


def solve(weight: Tensor, hessian: Tensor, form: Format, config: Config) -> Solution:
    """GPTQ for one layer: weight (out, in) fp32, hessian (in, in) fp32. With `hessian = I` the result is RTN's.

    ValueError if the Hessian is not finite, or not positive definite at any damping.
    """
    if not hessian.isfinite().all():
        raise ValueError("the Hessian is not finite: some calibration activation is infinite or NaN")
    original, undamped, width = weight, hessian, form.width(weight.shape[1])
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    hessian = hessian + torch.diag(dead.to(hessian))
    weight = weight.masked_fill(dead, 0)
    search = ScaleSearch.of(config)
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
        scale, zero_point = choose_scale(weight, form, search, importance)
    else:
        scale = weight.new_empty(weight.shape[0], columns // width, dtype=form.scale_dtype)
        zero_point = None if form.symmetric else torch.empty_like(scale, dtype=torch.int8)

    # Everything is transposed here: a column of W, and its groups' scales, are then contiguous.
    w = weight.T[order].contiguous()
    codes = torch.empty_like(w, dtype=torch.int8)
    taken = torch.empty_like(codes)
    s, z = _transposed(scale, zero_point)
    group_of = (order // width).tolist()
    step = -(-config.block_size // width) * width if width < columns else config.block_size
    for start in range(0, columns, step):
        end = min(start + step, columns)
        block, errors = w[start:end], torch.empty_like(w[start:end])
        for j, group in enumerate(group_of[start:end]):
            column = start + j
            if not static and column % width == 0:
                part = slice(column, column + width)
                group_scale, group_zero = choose_scale(
                    w[part].T, form, search, None if importance is None else importance[part]
                )
                scale[:, group] = group_scale[:, 0]
                if zero_point is not None:
                    zero_point[:, group] = group_zero[:, 0]
                s, z = _transposed(scale, zero_point)
            zero = None if z is None else z[group]
            steps = block[j] / s[group]
            level = form.snap_(steps.clone(), zero)
            codes[column] = form.encode(level, zero)
            taken[column] = residual(steps, level)
            errors[j] = (block[j] - level.mul_(s[group])) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    codes, taken = (t[order.argsort()].T.contiguous() for t in (codes, taken))
    rounded = Rounded(codes, scale, zero_point, form)
    error = _squared_output(original - rounded.value(torch.float32), undamped)
    return Solution(rounded, taken, damp, error, _squared_output(original, undamped))


def _transposed(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """fp32 scales and zero points, (groups, out)."""
    return scale.T.float().contiguous(), None if zero_point is None else zero_point.T.float().contiguous()


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


def _squared_output(weight: Tensor, hessian: Tensor) -> Tensor:
    """Diagonal of `W H W^T`, (out,)."""
    return ((weight @ hessian) * weight).sum(1)
