"""Qronos against the paper's two steps a column, against GPTQ, and against its own objective."""

import pytest
import torch

from methods.core.compensation import solve
from methods.core.formats.integer import Integer
from methods.core.job.options import CompensationOptions
from methods.core.model.hessian import Hessian, drift
from methods.core.scales import ScaleSearch, choose_scale


def problem(rows=8, columns=32, samples=256, moved=0.2):
    """A weight, inputs X (n, in) of now and X_0 of the full-precision model, H and the drift."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    then = torch.randn(samples, columns, generator=g) @ mix * torch.linspace(0.3, 2, columns)
    now = then + moved * torch.randn(samples, columns, generator=g) @ mix
    hessian = Hessian(columns, now.device)
    hessian.add(now)
    return torch.randn(rows, columns, generator=g), now, then, hessian.value(), drift([now], [then])


@pytest.mark.parametrize("group_size", [None, 16])
def test_without_drift_it_is_gptq(group_size):
    weight, _, _, hessian, _ = problem()
    grid = Integer(3, group_size)
    gptq = solve(weight, hessian, grid, CompensationOptions())
    qronos = solve(weight, hessian, grid, CompensationOptions(), torch.zeros_like(hessian))
    assert torch.equal(gptq.rounded.codes, qronos.rounded.codes)
    assert torch.equal(gptq.residual, qronos.residual)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_matches_the_two_steps_of_the_paper(bits, act_order):
    """Correction and diffusion of each column as least-squares problems in fp64; the damping as further samples."""
    weight, now, then, hessian, moved = problem()
    columns, damp = weight.shape[1], 0.01
    grid = Integer(bits, 16)

    further = (damp * hessian.diagonal().mean().double() * len(now) / 2).sqrt() * torch.eye(columns).double()
    x, x0 = torch.cat([now.double(), further]), torch.cat([then.double(), further])
    fit = torch.linalg.lstsq(x, x0 @ weight.T.double()).solution.T.float()
    scale, _ = choose_scale(fit, grid, ScaleSearch("search", norm=2.0), hessian.diagonal())
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(columns)
    x, x0, w = x[:, order], x0[:, order], weight[:, order].double()
    wanted, expected = x0 @ w.T, torch.zeros_like(w)
    v = w.clone()
    for j in range(columns):
        left = wanted - x[:, :j] @ expected[:, :j].T - x[:, j + 1 :] @ v[:, j + 1 :].T
        best = (x[:, j] @ left) / x[:, j].square().sum()
        s = scale[:, order[j] // 16].double()
        expected[:, j] = s * torch.clamp(torch.round(best / s), grid.q_min, grid.q_max)
        if j + 1 < columns:
            left = wanted - x[:, : j + 1] @ expected[:, : j + 1].T
            v[:, j + 1 :] = torch.linalg.lstsq(x[:, j + 1 :], left).solution.T

    solution = solve(weight, hessian, grid, CompensationOptions(act_order=act_order, damp=damp), moved)
    found = solution.rounded.value(torch.float32)[:, order].double()
    assert torch.equal(found[:, 0], expected[:, 0])
    # fp32 and fp64 may round a value that lies on a boundary differently, and the columns after it follow.
    assert (found == expected).double().mean() > 0.98


def test_an_input_that_is_dead_by_now_was_not_then():
    """The others make up for what it gave; a drift that is not finite is an error."""
    weight, now, then, _, _ = problem()
    now = now.clone()
    now[:, 5] = 0
    hessian = Hessian(now.shape[1], now.device)
    hessian.add(now)
    grid, config, moved = Integer(8, None), CompensationOptions(scale="minmax"), drift([now], [then])

    def error(weight_then):
        solution = solve(weight_then, hessian.value(), grid, config, moved)
        return (then @ weight.T - now @ solution.rounded.value(torch.float32).T).square().sum().item()

    without = weight.clone()
    without[:, 5] = 0
    assert error(weight) < 0.9 * error(without)
    with pytest.raises(ValueError, match="not finite"):
        solve(weight, hessian.value(), grid, config, torch.full_like(hessian.sum, torch.nan))


def test_it_keeps_the_outputs_better_than_gptq():
    weight, now, then, hessian, moved = problem(rows=64)

    def error(solution):
        return (then @ weight.T - now @ solution.rounded.value(torch.float32).T).square().sum().item()

    grid, config = Integer(4, 16), CompensationOptions()
    gptq, qronos = solve(weight, hessian, grid, config), solve(weight, hessian, grid, config, moved)
    assert error(qronos) < 0.9 * error(gptq)


def test_the_drift_is_of_all_rows():
    _, now, then, hessian, moved = problem()
    expected = 2 / len(now) * now.T @ (then - now)
    assert torch.allclose(moved, expected, atol=1e-5)
    batches = drift([now[:100], now[100:]], [then[:100], then[100:]])
    assert torch.allclose(batches, expected, atol=1e-5)
