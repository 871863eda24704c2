"""Bits for each layer: least distortion under a budget of stored bits (mixed precision, Hasan, arXiv 2411.06084).

The paper models the distortion of layer l with n_l weights at b bits as

    D_l(b) = alpha_l * n_l * var(W_l) * 2^(-2 b)

with a sensitivity alpha_l, and solves for real b_l by Lagrange multipliers. Real layers have whole bits, and a grid whose
error at 2 bits is far from 2^(-2 b). So here the squared error of rounding the layer's own weights to the scheme's grid
stands for `n_l var(W_l) 2^(-2 b)`, or the divergence that rounding causes is measured (methods/core/sensitivity.py), and the
bits are an integer program: one choice for each unit, least total distortion, stored bits within the budget. A unit consists
of the layers that share an input ({q, k, v}, {gate, up}), since inference engines fuse these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

# Distortions of single units add up only roughly. On SmolLM2-135M at 3 bits, 20 units at 2 bits cost 2.1 times the sum of
# what each costs alone, and 30 units at 4 bits gained 0.8 times the sum (reports/LOG.md). So a unit's distortion counts twice
# where it has fewer bits than the average.
INTERACTION_PENALTY = 2.0
# HiGHS stops 1e-6 from the optimum, in absolute terms: costs are scaled to make this 1e-12 of the largest.
LARGEST_COST = 1e6


def with_interaction(
    distortion: dict[int, float], stored: dict[int, int], weights: int, average_bits: float
) -> dict[int, float]:
    """A unit's distortion by bits where the other units are rounded too: below the average, a multiple of its own alone."""
    return {
        bits: value * INTERACTION_PENALTY if stored[bits] < average_bits * weights else value
        for bits, value in distortion.items()
    }


def allocate(stored: Sequence[dict[int, int]], distortion: Sequence[dict[int, float]], budget: int) -> list[int]:
    """Bits for each unit: the choice of least total distortion whose stored bits are within `budget`.

    stored, distortion: of each unit, by bits. ValueError if the smallest choices exceed the budget, or if a distortion is not
    finite.
    """
    if (smallest := sum(min(s.values()) for s in stored)) > budget:
        raise ValueError(f"the smallest choices take {smallest} bits, the budget is {budget}")
    choices = [(i, bits) for i, s in enumerate(stored) for bits in s]
    cost = np.array([distortion[i][bits] for i, bits in choices])
    if not np.isfinite(cost).all():
        i, bits = choices[int(np.flatnonzero(~np.isfinite(cost))[0])]
        raise ValueError(f"the distortion of unit {i} at {bits} bits is {distortion[i][bits]}")
    one_each = np.zeros((len(stored), len(choices)))
    one_each[[i for i, _ in choices], range(len(choices))] = 1
    # In the largest whole unit of size: the smallest excess is then far above the solver's tolerance.
    quantum = math.gcd(*(size for s in stored for size in s.values()))
    size = np.array([stored[i][bits] // quantum for i, bits in choices], dtype=float)
    capacity = bound = budget // quantum
    while True:
        solution = milp(
            cost * (LARGEST_COST / (cost.max() or 1)),
            integrality=np.ones(len(choices)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size, -np.inf, bound)],
            options={"mip_rel_gap": 0},
        )
        if not solution.success:
            raise RuntimeError(f"no allocation was found: {solution.message}")
        chosen = [choices[k][1] for k in np.flatnonzero(solution.x > 0.5)]
        excess = sum(s[bits] for s, bits in zip(stored, chosen, strict=True)) // quantum - capacity
        if excess <= 0:
            return chosen
        bound -= excess  # the solver tolerated this excess, as it may where the sizes have no large common divisor
