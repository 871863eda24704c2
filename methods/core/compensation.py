"""Rounding a weight column by column, the columns not yet rounded making up for the error: the solver of GPTQ and Qronos.

A layer with weight W (out, in) has the calibration inputs X (n, in) by now and had X_0 in the full-precision model. With
`H = (2 / n) X^T X`, damped, and U the upper Cholesky factor of `H^-1`, for column j:

    err = (w_j - q_j) / U_jj,      w_k <- w_k - err * U_jk   for the later columns k

minimizes `||(W - W_q) X^T||^2` (GPTQ, arXiv 2210.17323, algorithm 1). Qronos (arXiv 2505.11695) minimizes
`||W X_0^T - W_q X^T||^2` and is the same recursion from other weights; `solve` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from methods.core.formats import Format, Rounded, per_group
from methods.core.job.log import RunLog
from methods.core.job.options import CompensationOptions
from methods.core.model.hessian import Hessian
from methods.core.model.layers import QuantizedLinear, residual, residual_steps
from methods.core.model.walk import Stage
from methods.core.scales import ScaleSearch, choose_scale, rounded_to_nearest
from methods.core.scheme import Scheme


def quantize_stage(
    stage: Stage, scheme: Scheme, config: CompensationOptions, log: RunLog, drift: Tensor | None = None
) -> None:
    """Put the quantized forms of a stage's layers in their place. They share H, so they are stacked by rows and solved once.

    drift (in, in): see `solve`. Adds the seconds "hessian" and "solve" to the log.
    """
    leader = next(iter(stage.layers.values()))
    with log.timer("hessian"):
        moments = Hessian(leader.in_features, leader.weight.device)
        for x in stage.inputs:
            moments.add(x)
        hessian = moments.value()
    if not moments.rows:
        stage.replace(_not_reached(stage.layers, scheme, config, log))
        return
    # One format for all, unless an allocation gives layers of one input different bits.
    formats: dict[Format, dict[str, nn.Linear]] = {}
    for name, linear in stage.layers.items():
        formats.setdefault(scheme.number_format(name, linear.in_features), {})[name] = linear
    with log.timer("solve"):
        for form, layers in formats.items():
            stage.replace(_quantized_together(layers, hessian, form, config, log, drift))


def _not_reached(
    layers: dict[str, nn.Linear], scheme: Scheme, config: CompensationOptions, log: RunLog
) -> dict[str, QuantizedLinear]:
    """The quantized forms of an expert's layers that no calibration token reaches. ValueError unless they may be rounded."""
    if config.unreached == "error":
        raise ValueError(
            f"no calibration token reaches {', '.join(layers)}: calibrate on more tokens, or set the option unreached to rtn"
        )
    log.departure(f"{', '.join(layers)}: no calibration token reaches them; rounded to nearest")
    quantized = {}
    for name, linear in layers.items():
        form = scheme.number_format(name, linear.in_features)
        rounded = rounded_to_nearest(linear.weight.detach(), form, ScaleSearch.of(config))
        quantized[name] = QuantizedLinear.replacing(linear, rounded)
    return quantized


def _quantized_together(
    layers: dict[str, nn.Linear],
    hessian: Tensor,
    form: Format,
    config: CompensationOptions,
    log: RunLog,
    drift: Tensor | None,
) -> dict[str, QuantizedLinear]:
    """The quantized forms of layers that share an input, solved as one weight."""
    linears = list(layers.values())
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    solution = solve(weight, hessian, form, config, drift)
    if solution.damp > config.damp:
        log.departure(f"{', '.join(layers)}: damping raised from {config.damp:g} to {solution.damp:g}")
    ends = list(accumulate(linear.out_features for linear in linears))
    if drift is None:  # else W's outputs from the inputs of now are not those in full precision
        error = squared_output(weight - solution.rounded.value(torch.float32), hessian)
        output = squared_output(weight, hessian)
    quantized = {}
    for (name, linear), end in zip(layers.items(), ends, strict=True):
        rows = slice(end - linear.out_features, end)
        quantized[name] = QuantizedLinear.replacing(linear, solution.rounded.rows(rows))
        quantized[name].residual = solution.residual[rows].cpu()  # not needed on the device again
        log.layer(name, damping=solution.damp)
        if drift is None:
            whole = output[rows].sum().item()
            log.layer(name, output_error=error[rows].sum().item() / whole if whole else 0.0)
    return quantized


@dataclass(frozen=True)
class Solution:
    rounded: Rounded
    residual: Tensor  # (out, in) int8: what rounding took off each weight as it was then, not as it was at first
    damp: float  # the damping that was needed


def solve(
    weight: Tensor, hessian: Tensor, form: Format, config: CompensationOptions, drift: Tensor | None = None
) -> Solution:
    """A rounded layer: weight (out, in) fp32, hessian (in, in) fp32. With `hessian = I` the result is RTN's.

    With `drift = (2 / n) X^T (X_0 - X)` (in, in) what is rounded is not W but V, the weight whose outputs from the inputs of
    now are nearest to those that W had, `argmin_V ||W X_0^T - V X^T||^2 + damping ||V - W||^2 = W + W drift^T H^-1`. The
    first column alone is corrected with all later columns still at W (Qronos). Scales are chosen for V.

    ValueError if the Hessian is not finite, or not positive definite at any damping.
    """
    if not hessian.isfinite().all() or (drift is not None and not drift.isfinite().all()):
        raise ValueError("the Hessian is not finite: some calibration activation is infinite or NaN")
    original, width = weight, form.width(weight.shape[1])
    diagonal = hessian.diagonal().clone()
    dead = diagonal == 0
    hessian = hessian + torch.diag(dead.to(hessian))
    if form.zero:
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
    first = None
    if drift is not None:
        missing = (original @ drift.T)[:, order]
        first = weight[:, order[0]] + missing[:, 0] / (hessian[order[0], order[0]] + damp * hessian.diagonal().mean())
        weight = weight.index_add(1, order, missing @ factor.T @ factor)
    static = config.static_groups or config.act_order or width == columns
    if static:
        scale, zero_point = choose_scale(weight, form, search, importance)
    else:
        scale = weight.new_empty(weight.shape[0], columns // width, dtype=form.scale_dtype)
        zero_point = None if form.symmetric else torch.empty_like(scale, dtype=torch.int8)

    # Everything is transposed here: a column of the weight, and its groups' scales, are then contiguous.
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
            steps = (block[j] if first is None or column else first) / s[group]
            level = form.snap_(steps.clone(), zero)
            codes[column] = form.encode(level, zero)
            taken[column] = residual(steps, level)
            errors[j] = (block[j] - level.mul_(s[group])) / factor[column, column]
            block[j + 1 :].addr_(factor[column, column + 1 : end], errors[j], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)

    codes, taken = (t[order.argsort()].T.contiguous() for t in (codes, taken))
    rounded = Rounded(codes, scale, zero_point, form)
    levels = rounded.levels(torch.float32)
    before = levels + residual_steps(taken).view_as(levels)
    # Where levels lie closer than a step, what a residual can say may be beyond the boundary.
    moved = form.snap_(before, per_group(zero_point)) != levels
    return Solution(rounded, taken.masked_fill_(moved.flatten(1), 0), damp)


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


def squared_output(weight: Tensor, hessian: Tensor) -> Tensor:
    """`||w X^T||^2` of each row w of a weight (out, in), up to the factor 2 / n: the diagonal of `W H W^T`, (out,)."""
    return ((weight @ hessian) * weight).sum(1)
