"""Floating-point operations of a training, counted by torch while a part of one of its steps runs.

Counted are matrix products and attention, two operations for each multiplication and addition, in the forward and in the
backward pass, of everything that a step runs: the teacher of a distillation, low-rank terms and recomputed products too. For
a step of T tokens through layers of N weights that is 2 T N forward, 2 T N for the gradient of the layers' inputs and, where
weights are trained through it, 2 T N for that of the weights. Elementwise work, such as rounding, is not counted.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def counter() -> FlopCounterMode:
    """A context that counts; its `get_total_flops()` is known afterwards."""
    # torch knows the operators of attention on accelerators, and not the CPU's.
    return FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _forward, _CPU_ATTENTION_BACKWARD: _backward})


def _forward(query: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args, out_shape=None, **kwargs
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
