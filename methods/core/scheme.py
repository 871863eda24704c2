"""A scheme says what is quantized and to which number format. Methods do not choose it. Nothing here imports torch before a
format is made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from methods.core.job import registry
from methods.core.job.options import build_config, choose, require_between

if TYPE_CHECKING:
    from methods.core.formats import Format

FORMATS = "methods.core.formats"
SENSITIVITIES = ("kl", "fisher", "uniform")  # functions of methods/core/sensitivity.py


@dataclass(frozen=True)
class WeightScheme:
    """Format and groups of the weights. `group_size` None: per output channel.

    Every layer has `bits`, or each has one of `choices`, such that what is stored takes `average_bits` per weight of these
    layers or less, scales and padding included: 3.25 is what 3 bits in groups of 64 take. Which layer has how many is
    computed before (methods/core/allocation.py) from the layers' `sensitivity`.

    `other_group_size` is for layers whose width `group_size` does not divide: a smaller group, or "channel". Without it
    such a layer is an error.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    other_group_size: int | str | None = None
    average_bits: float | None = None
    choices: tuple[int, ...] = ()
    sensitivity: str = "kl"
    format: str = "integer"  # a file in methods/core/formats

    def __post_init__(self):
        require_between(self, 2, 65536, "group_size")
        if isinstance(self.other_group_size, str):
            choose(self.other_group_size, ["channel"], "other_group_size, which is a number or")
        else:
            require_between(self, 2, 65536, "other_group_size")
        if (self.bits is None) == (not self.choices):
            raise ValueError("it needs either bits, or average_bits and choices")
        valid = _check_format(self.format, self.symmetric, self.bits)
        if self.mixed and (len(set(self.choices)) < 2 or not set(self.choices) <= set(valid)):
            raise ValueError(
                f"choices are at least two different numbers of bits from {valid[0]} to {valid[-1]}, not {list(self.choices)}"
            )
        if self.sensitivity not in SENSITIVITIES:
            raise ValueError(f"sensitivity {self.sensitivity!r} is none of {', '.join(SENSITIVITIES)}")
        if not self.mixed and (self.average_bits is not None or self.sensitivity != "kl"):
            raise ValueError("average_bits and sensitivity belong to choices; this scheme has bits")
        if (self.mixed or self.other_group_size is not None) and not self.symmetric:
            raise ValueError(
                f"{'average_bits' if self.mixed else 'other_group_size'} needs a symmetric grid: transformers cannot load "
                "zero points of several grids"
            )

    @property
    def mixed(self) -> bool:
        """Whether layers differ in their bits."""
        return bool(self.choices)

    @property
    def widths(self) -> tuple[int, ...]:
        """The bits that a layer may have, ascending."""
        return tuple(sorted(self.choices)) or (self.bits,)

    def number_format(self, bits: int, in_features: int) -> Format:
        """Format of a layer `in_features` wide that has `bits`. ValueError if no group size of the scheme divides that."""
        import torch

        from methods.core.formats import make

        scale_dtype = getattr(torch, self.scale_dtype)
        return make(self.format, bits, self.group_size_for(in_features), self.symmetric, scale_dtype)

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
    """Dynamic quantization of activations, each token with a scale of its own (methods/core/model/activations.py)."""

    bits: int
    symmetric: bool = True
    format: str = "integer"

    def __post_init__(self):
        _check_format(self.format, self.symmetric, self.bits)
        if not registry.constants(FORMATS, self.format).get("ZERO", True):
            raise ValueError(f"format {self.format} has no level of zero, which activations need")

    def number_format(self) -> Format:
        """The format of a token: one group, with a scale in fp32, for it is never stored."""
        import torch

        from methods.core.formats import make

        return make(self.format, self.bits, None, self.symmetric, torch.float32)


def format_files(names: Iterable[str]) -> list[str]:
    """Files of number formats. They are imported by name, so no import statement tells that a program is made of them."""
    return [f"{FORMATS.replace('.', '/')}/{name}.py" for name in names]


def _check_format(name: str, symmetric: bool, bits: int | None) -> tuple[int, ...]:
    """The bits that a format exists for. ValueError if there is no such format, or none with zero points or these bits."""
    choose(name, registry.names(FORMATS), "number format (a file in methods/core/formats/)")
    constants = registry.constants(FORMATS, name)
    if not symmetric and not constants["ASYMMETRIC"]:
        raise ValueError(f"format {name} has no zero points: symmetric must be true")
    valid = constants["BITS"]
    if bits is not None and bits not in valid:
        raise ValueError(f"format {name} has {', '.join(map(str, valid))} bits, not {bits}")
    return valid


KINDS = {"weights": WeightScheme, "activations": TokenScheme, "kv_cache": TokenScheme}


@dataclass(frozen=True)
class Scheme:
    """`activations`: the inputs of every quantized layer. `kv_cache`: keys and values before the rotary embedding.

    `allocation`: the bits of each layer by its name, for weights with `average_bits`.
    """

    name: str
    weights: WeightScheme | None = None
    activations: TokenScheme | None = None
    kv_cache: TokenScheme | None = None
    allocation: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if self.weights is None and (self.activations or self.kv_cache):
            raise ValueError("activations and kv_cache need weights: only quantized layers quantize their tokens")

    @classmethod
    def from_dict(cls, name: str, spec: dict[str, Any], allocation: dict[str, int] | None = None) -> Scheme:
        """From a configuration entry; `group_size: channel` is the same as none, choices have no order. ValueError for an
        unknown key or a value that is none of its own."""
        parts: dict[str, Any] = {}
        for kind, part in spec.items():
            choose(kind, KINDS, "part of a scheme")
            if not isinstance(part, dict):
                raise ValueError(f"{kind} is {part!r}; it must be a mapping such as {{bits: 4}}")
            if kind == "weights":
                part = {k: None if (k, v) == ("group_size", "channel") else v for k, v in part.items()}
                if isinstance(part.get("choices"), list | tuple):
                    part["choices"] = tuple(sorted(set(part["choices"])))
            parts[kind] = build_config(KINDS[kind], part, kind)
        return cls(name, **parts, allocation=allocation or {})

    @property
    def formats(self) -> list[str]:
        """Names of the number formats in use, modules of methods/core/formats."""
        return sorted({part.format for part in (self.weights, self.activations, self.kv_cache) if part})

    def bits(self, layer: str) -> int:
        """Bits of a layer. ValueError if they differ by layer and the allocation does not have this one."""
        if not self.weights.mixed:
            return self.weights.bits
        if layer not in self.allocation:
            raise ValueError(
                f"scheme {self.name!r} has average_bits, and no allocation says how many bits {layer} has; "
                "python -m workflow.prepare.allocate makes one"
            )
        return self.allocation[layer]

    def number_format(self, layer: str, in_features: int) -> Format:
        """Format of a linear layer, by name, with `in_features` input columns. ValueError if the scheme does not fit it."""
        return self.weights.number_format(self.bits(layer), in_features)
