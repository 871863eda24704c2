"""Hadamard matrices, and orthogonal ones of the widths that have none here.

A Hadamard matrix has entries +-1 and orthogonal rows. Sylvester's doubling gives the powers of two; Paley's constructions
give `q + 1` for a prime q = 3 mod 4 and `2 (q + 1)` for a prime q = 1 mod 4; the Kronecker product of two is one again. So
576 is 36 x 16 and 1536 is 12 x 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_orthogonal(width: int, generator: torch.Generator) -> tuple[Tensor, str]:
    """An orthogonal matrix (width, width), fp64, that spreads each coordinate over all, and what it is made of.

    It is `diag(random signs) H / sqrt(width)` for a Hadamard matrix H where one can be constructed. Else it is the Kronecker
    product of a Hadamard matrix for the power of two in the width and a random orthogonal matrix for its odd part.
    """
    signs = torch.randint(0, 2, (width, 1), generator=generator).double() * 2 - 1
    if (orders := hadamard_orders(width)) is not None:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        for order in orders:
            matrix = torch.kron(
                matrix, _paley(order) if order > 2 else torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
            )
        return signs * matrix / math.sqrt(width), f"Hadamard matrix, {_product(orders)}"
    power = width & -width
    dense, _ = torch.linalg.qr(torch.randn(width // power, width // power, generator=generator, dtype=torch.float64))
    doubling, _ = random_orthogonal(power, generator)
    return signs * torch.kron(
        dense.contiguous(), doubling.contiguous()
    ), f"random orthogonal {width // power} x Hadamard {power}"


def hadamard_orders(width: int) -> tuple[int, ...] | None:
    """Orders of constructed Hadamard matrices whose product is `width`, the largest first; None if there are none."""
    power = (width & -width).bit_length() - 1
    odd = width >> power
    if odd == 1:
        return (2,) * power
    # A divisor of the odd part times 4 or more is a possible order of Paley's.
    for divisor in sorted({d for d in range(3, odd + 1, 2) if odd % d == 0}, reverse=True):
        for twos in range(2, power + 1):
            order = divisor << twos
            if _prime_of(order) and (rest := hadamard_orders(width // order)) is not None:
                return (order, *rest)
    return None


def _product(orders: tuple[int, ...]) -> str:
    power = math.prod(order for order in orders if order == 2)
    return " x ".join(str(order) for order in [o for o in orders if o > 2] + ([power] if power > 1 else []))


def _prime_of(order: int) -> int | None:
    """The prime q from which Paley's constructions make a matrix of this order."""
    if _is_prime(order - 1) and order % 4 == 0:
        return order - 1
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        return order // 2 - 1
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _paley(order: int) -> Tensor:
    """Paley's Hadamard matrix: with Q_ij the quadratic character of i - j mod q, bordered by ones."""
    q = _prime_of(order)
    residues = {x * x % q for x in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if x in residues else -1.0 for x in range(1, q)], dtype=torch.float64)
    difference = (torch.arange(q).unsqueeze(1) - torch.arange(q)) % q
    bordered = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    bordered[0, 1:] = 1
    bordered[1:, 1:] = character[difference]
    identity = torch.eye(q + 1, dtype=torch.float64)
    if order == q + 1:
        bordered[1:, 0] = -1
        return identity + bordered
    bordered[1:, 0] = 1
    return torch.kron(bordered, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()) + torch.kron(
        identity, torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
    )
