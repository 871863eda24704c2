"""Second moments of a layer's inputs: the Hessian of its squared output error, and how far its inputs have moved."""

from __future__ import annotations

import torch
from torch import Tensor

from methods.core.job import ranks


class Hessian:
    """`H = (2 / n) X^T X` over the rows of all inputs X (n, in) added; fp32, on the inputs' device.

    `rows` is their number n: after `value`, that of all processes.
    """

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
        """Of all processes together, if several share the inputs; each must ask for it. Zeros, if there were no rows."""
        upper, rows = self.sum.triu(), self.sum.new_tensor([self.rows])
        ranks.add_up([upper, rows])
        self.rows = int(rows.item())
        return (upper + upper.triu(1).T) * (2 / max(1, self.rows))


def drift(inputs: list[Tensor], full_precision: list[Tensor]) -> Tensor:
    """`(2 / n) X^T (X_0 - X)` (in, in), fp32, on the device of the inputs X (n, in); X_0 are those in full precision."""
    width, device = inputs[0].shape[-1], inputs[0].device
    total = torch.zeros(width, width, device=device)
    rows = total.new_zeros(1)
    for now, then in zip(inputs, full_precision, strict=True):
        now, then = now.flatten(0, -2).float(), then.to(device).flatten(0, -2).float()
        rows += len(now)
        total.addmm_(now.T, then - now)
    ranks.add_up([total, rows])
    return total * (2 / rows.item())
