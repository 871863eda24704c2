"""The Hessian of a layer's squared output error, from the inputs that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """`H = (2 / n) X^T X` over the rows of all inputs X (n, in) added; fp32, on the inputs' device."""

    def __init__(self, width: int, device: torch.device):
        self.sum = torch.zeros(width, width, device=device)
        self.rows = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        self.rows += x.shape[0]
        # H is symmetric: the blocks below the diagonal are copied at the end, which saves a third of the work.
        for first in range(0, x.shape[1], 256):
            self.sum[first : first + 256, first:].addmm_(x[:, first : first + 256].T, x[:, first:])

    def value(self) -> Tensor:
        upper = self.sum.triu()
        return (upper + upper.triu(1).T) * (2 / self.rows)
