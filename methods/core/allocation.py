"""Bits for each layer: least distortion under a budget of stored bits (mixed precision, Hasan, arXiv 2411.06084).

The paper models the distortion of layer l with n_l weights at b bits as

    D_l(b) = alpha_l * n_l * var(W_l) * 2^(-2 b)

with a sensitivity alpha_l, and solves for real b_l by Lagrange multipliers. Real layers have whole bits, and a grid whose
error at 2 bits is far from 2^(-2 b). So here the squared error of rounding the layer's own weights to the scheme's grid
stands for `n_l var(W_l) 2^(-2 b)`, or the divergence that rounding causes is measured (methods/core/sensitivity.py), and the
bits are an integer program: one choice for each unit, least total distortion, stored bits within the budget. A unit is the
layers that share an input ({q, k, v}, {gate, up}): inference engines fuse them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from methods.core.grid import Grid, ScaleSearch, choose_scale, dequantize, quantize
from methods.core.log import RunLog
from methods.core.scheme import WeightScheme

ROWS = 128  # of a layer, whose rounding error is taken for that of all: to a percent of it, and ten times faster


@dataclass(frozen=True)
class Unit:
    """Layers that get the same bits; `stored` and `error` by bits: what they take in a checkpoint, and their weights' summed
    squared rounding error."""

    layers: tuple[str, ...]
    weights: int
    stored: dict[int, int]
    error: dict[int, float]


def units_of(linears: dict[str, nn.Linear], stages: list[list[str]], scheme: WeightScheme, log: RunLog) -> list[Unit]:
    """The units of a model's layers, each rounded to every width of the scheme."""
    units = []
    for stage in log.progress(stages, "rounding to each width", "unit"):
        shapes = [tuple(linears[name].weight.shape) for name in stage]
        stored = {bits: sum(scheme.stored_bits(bits, *shape) for shape in shapes) for bits in scheme.widths}
        error = {bits: sum(rounding_error(linears[name], scheme, bits) for name in stage) for bits in scheme.widths}
        units.append(Unit(tuple(stage), sum(a * b for a, b in shapes), stored, error))
    return units


def rounding_error(linear: nn.Linear, scheme: WeightScheme, bits: int) -> float:
    """Summed squared error of a layer's weights when they are rounded to `bits` with the best scales, from some rows."""
    weight = linear.weight.detach().float()
    weight = weight[:: max(1, len(weight) // ROWS)]
    dtype = getattr(torch, scheme.scale_dtype)
    grid = Grid(bits, scheme.group_size_for(linear.in_features), scheme.symmetric, dtype)
    scale, zero_point = choose_scale(weight, grid, ScaleSearch("search", norm=2.0))
    rounded = dequantize(quantize(weight, scale, zero_point, grid), scale, zero_point, torch.float32)
    return float((rounded - weight).square().mean(dtype=torch.float64)) * linear.weight.numel()


# Distortions of single units add up only roughly. On SmolLM2-135M at 3 bits, 20 units at 2 bits cost 2.1 times the sum of
# what each costs alone, 30 units at 4 bits gained 0.9 times the sum (reports/LOG.md): to take bits away needs a good reason.
COMPANY = 2.0


def in_company(distortion: dict[int, float], unit: Unit, average_bits: float) -> dict[int, float]:
    """A unit's distortion by bits, where the other units are not exact either: COMPANY times it below the average bits."""
    return {
        bits: value * (COMPANY if unit.stored[bits] < average_bits * unit.weights else 1)
        for bits, value in distortion.items()
    }


def allocate(stored: list[dict[int, int]], distortion: list[dict[int, float]], budget: int) -> list[int]:
    """Bits for each unit: the choice of least total distortion whose stored bits are within `budget`, exactly.

    stored, distortion: of each unit, by bits. ValueError if not even the smallest choices fit.
    """
    if sum(min(s.values()) for s in stored) > budget:
        raise ValueError(
            f"the smallest choices take {sum(min(s.values()) for s in stored)} bits, the budget is {budget}"
        )
    choices = [(i, bits) for i, s in enumerate(stored) for bits in s]
    cost = np.array([distortion[i][bits] for i, bits in choices])
    size = np.array([stored[i][bits] for i, bits in choices], dtype=float)
    one_each = np.zeros((len(stored), len(choices)))
    one_each[[i for i, _ in choices], range(len(choices))] = 1
    # Scaled, so that the solver's tolerances are relative to the problem's own numbers.
    found = milp(
        cost / cost.max(),
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size / budget, -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise RuntimeError(f"no allocation was found: {found.message}")
    chosen = [choices[k][1] for k in np.flatnonzero(found.x > 0.5)]
    if sum(s[bits] for s, bits in zip(stored, chosen, strict=True)) > budget:
        raise RuntimeError("the solver's allocation is above the budget")
    return chosen
