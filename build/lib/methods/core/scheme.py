"""A scheme says what is quantized and to which grid. Methods do not choose it. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from methods.core.grid import Grid

SCALE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class WeightScheme:
    """Grid of the weights. `group_size` None: per output channel.

    `other_group_size` is for layers whose width `group_size` does not divide: a smaller group, or "channel". Without it
    such a layer is an error.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: str = "bfloat16"
    other_group_size: int | str | None = None

    def __post_init__(self):
        if self.other_group_size is not None and not self.symmetric:
            raise ValueError(
                "other_group_size needs a symmetric grid: transformers cannot load the other kind of checkpoint"
            )

    def group_size_for(self, in_features: int) -> int | None:
        """Group size of a layer `in_features` wide. ValueError if no group size of the scheme divides it."""
        if self.group_size is None or in_features % self.group_size == 0:
            return self.group_size
        other = self.other_group_size
        if other == "channel":
            return None
        if other is not None and in_features % other == 0:
            return other
        fits = [g for g in (16, 32, 64, 96, 128, 192, 256) if in_features % g == 0]
        tried = f"group_size {self.group_size}" + (f" and other_group_size {other} do" if other else " does")
        raise ValueError(
            f"{tried} not divide a layer of {in_features} input columns; divisors are {fits}; "
            "other_group_size (a number or 'channel') says what such layers get"
        )


@dataclass(frozen=True)
class TokenScheme:
    """Dynamic quantization of activations, each token with a scale of its own (methods/core/activations.py)."""

    bits: int
    symmetric: bool = True


@dataclass(frozen=True)
class Scheme:
    """`activations`: the inputs of every quantized layer. `kv_cache`: keys and values before the rotary embedding."""

    name: str
    weights: WeightScheme | None = None
    activations: TokenScheme | None = None
    kv_cache: TokenScheme | None = None

    def __post_init__(self):
        if self.weights is None and (self.activations or self.kv_cache):
            raise ValueError("activations and kv_cache need weights: only quantized layers quantize their tokens")

    @classmethod
    def from_dict(cls, name: str, spec: dict[str, Any]) -> Scheme:
        """From a checked configuration entry; `group_size: channel` is the same as none."""
        weights = spec.get("weights")
        if weights is not None:
            weights = dict(weights)
            if weights.get("group_size") == "channel":
                weights["group_size"] = None
            weights = WeightScheme(**weights)
        tokens = {kind: TokenScheme(**spec[kind]) for kind in ("activations", "kv_cache") if kind in spec}
        return cls(name, weights, **tokens)

    def grid(self, in_features: int) -> Grid:
        """Grid of a linear layer with `in_features` input columns. ValueError if the scheme does not fit it."""
        import torch

        from methods.core.grid import Grid

        w = self.weights
        return Grid(w.bits, w.group_size_for(in_features), w.symmetric, getattr(torch, w.scale_dtype))
