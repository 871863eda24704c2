"""Number formats. One public module in this folder is one format; the folder is the registry.

A format says which levels a weight may take, in *steps*, that is in units of its group's scale, and how a scale follows from
the range that it must cover:

    w ~ scale * level,        level = clip(round(w / scale))

Everything that rounds asks it: scale search, GPTQ, the training of a fake-quantized weight, activations, the checkpoint.
A format's module has

    BITS         the numbers of bits that it exists for
    ASYMMETRIC   whether it can have zero points
    ZERO         False if it has no level of zero; such a format is for weights only
    FORMAT       a subclass of `Format`
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from methods.core.job import registry

SMALLEST = torch.finfo(torch.float32).tiny  # of the scales: numbers below it have fewer digits


@dataclass(frozen=True)
class Format:
    """A number format and its groups: `group_size` consecutive columns of a row share a scale; None for the whole row.

    Levels are fp32 tensors in steps. A zero point shifts the levels of a group: level = code - zero_point; it is None where
    the format is symmetric. Codes are int8 in `-2^(bits-1) .. 2^(bits-1) - 1`.
    """

    bits: int
    group_size: int | None
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16

    zero: ClassVar[bool] = True  # whether there is a level of zero
    name: ClassVar[str]  # of its module
    container_type: ClassVar[str]  # of the packed codes in a checkpoint; compressed-tensors knows "int"

    def width(self, in_features: int) -> int:
        """Columns per group. ValueError if the group size does not divide `in_features`."""
        if self.group_size is None:
            return in_features
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide a layer of {in_features} input columns")
        return self.group_size

    def scale_of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point with which the levels cover [low, high], low <= 0 <= high; as they will be stored."""
        raise NotImplementedError

    def signs(self, low: Tensor, high: Tensor) -> list[Tensor]:
        """The signs, 1 or -1, that a scale for [low, high] may have, the likely one first. -1 is for levels that reach
        further on one side of zero, where no zero point shifts them."""
        return [torch.ones_like(low)]

    def round(self, steps: Tensor) -> Tensor:
        """The nearest level, as if the levels went on without end."""
        raise NotImplementedError

    def clip(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Levels that are outside the range at its ends. The gradient passes inside the range."""
        raise NotImplementedError

    def limit(self, steps: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Steps that are outside the range at its ends, before they are rounded; the gradient passes inside."""
        return self.clip(steps, zero_point)

    def snap_(self, steps: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """`clip(round(steps))`; may use the memory of `steps`, and knows no gradient."""
        return self.clip(self.round(steps), zero_point)

    def encode(self, levels: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """Codes, int8, of levels."""
        raise NotImplementedError

    def decode(self, codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Levels of codes."""
        raise NotImplementedError

    def stored_scale(self, scale: Tensor) -> Tensor:
        """A scale, which training may have left anywhere, as it is stored; the largest that there is for a larger one."""
        most = torch.finfo(self.scale_dtype).max
        return scale.float().clamp(-most, most).to(self.scale_dtype)

    def positive(self, scale: Tensor) -> Tensor:
        """A scale as it is stored, and where that is 0 the mean of the others, or 1 without any: a group of zeros needs some
        scale, and any gives zeros, but a training that moves weights in steps of the grid should find it no coarser than the
        others. So does one that is smaller than SMALLEST, whose products with levels fp32 does not tell apart."""
        scale = self.stored_scale(scale)
        some = scale.float() >= SMALLEST
        mean = torch.where(some, scale.float(), 0).sum() / some.sum().clamp(min=1)
        usual = torch.where(some.any(), mean, 1.0)
        return torch.where(some, scale, usual.to(scale.dtype))

    def pack(self, codes: Tensor, dim: int = 1) -> Tensor:
        """Codes, or zero points, along `dim` in words of 32 bits, the first code in the lowest bits."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        return pack_to_int32(codes.cpu(), self.bits, packed_dim=dim).contiguous()

    def unpack(self, packed: Tensor, shape: torch.Size, dim: int = 1) -> Tensor:
        """The int8 codes of `pack`, of this shape."""
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        if dim == 0:  # here, since compressed-tensors 0.20 fails for 4 bits if a column is a single word
            rows = packed.T.clone(memory_format=torch.contiguous_format)
            return unpack_from_int32(rows, self.bits, torch.Size(reversed(shape))).T
        return unpack_from_int32(packed, self.bits, shape)

    def stored_bits(self, rows: int, columns: int) -> int:
        """What a matrix takes as `pack` stores it: codes, rows in whole words of 32 bits; scales; zero points, columns in
        whole words."""
        groups = columns // self.width(columns)
        zero_points = 0 if self.symmetric else groups * _words(rows * self.bits)
        return rows * (_words(columns * self.bits) + groups * self.scale_dtype.itemsize * 8) + zero_points

    def quantize(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Rounded:
        """Each value of `weight` (out, in) at its nearest level, for scale and zero point (out, groups)."""
        z = per_group(zero_point)
        levels = self.snap_(in_steps(weight, scale), z)
        return Rounded(self.encode(levels, z).flatten(1), scale, zero_point, self)


def _words(bits: int) -> int:
    """Bits in whole words of 32."""
    return -(-bits // 32) * 32


@dataclass(frozen=True)
class Rounded:
    """A rounded weight: codes (out, in) int8, scale and zero point (out, groups), and the format that they are of."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    format: Format

    def value(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), computed in `dtype` as compressed-tensors does when it loads a checkpoint."""
        return (self.levels(dtype) * per_group(self.scale, dtype)).flatten(1)

    def levels(self, dtype: torch.dtype) -> Tensor:
        """The weight in steps, (out, groups, columns per group)."""
        return self.format.decode(grouped(self.codes, self.scale), per_group(self.zero_point, dtype), dtype)

    def packed(self) -> Packed:
        """The same as it is stored."""
        form = self.format
        words = form.pack(self.codes).to(self.codes.device)
        return Packed(words, self.codes.shape, form.stored_scale(self.scale), self.zero_point, form)

    def rows(self, part: slice) -> Rounded:
        """Some rows, as tensors of their own."""
        zero_point = None if self.zero_point is None else self.zero_point[part].clone()
        return Rounded(self.codes[part].clone(), self.scale[part].clone(), zero_point, self.format)


@dataclass(frozen=True)
class Packed:
    """A rounded weight as a checkpoint has it: codes of a matrix of this shape (out, in) in words of 32 bits (out, words)."""

    words: Tensor
    shape: torch.Size
    scale: Tensor
    zero_point: Tensor | None
    format: Format

    def rounded(self) -> Rounded:
        """Its codes."""
        return Rounded(self.format.unpack(self.words, self.shape), self.scale, self.zero_point, self.format)


def grouped(weight: Tensor, scale: Tensor) -> Tensor:
    """A view (out, groups, columns per group) of a weight (out, in) whose scale is (out, groups)."""
    return weight.unflatten(1, (scale.shape[1], -1))


def per_group(values: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Scales or zero points (out, groups) as they stand beside a grouped weight, (out, groups, 1); None stays None."""
    return None if values is None else values.unsqueeze(-1).to(dtype)


def in_steps(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight (out, in) in units of its groups' scale, fp32 (out, groups, columns per group)."""
    return grouped(weight.float(), scale) / per_group(scale)


def make(
    name: str,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Format:
    """The format of a module of this folder. ValueError if its class has another name."""
    form = registry.load("methods.core.formats", name).FORMAT
    if form.name != name:
        raise ValueError(f"methods/core/formats/{name}.py: its FORMAT has the name {form.name!r}")
    return form(bits, group_size, symmetric, scale_dtype)


@cache
def of_container_type(container_type: str) -> str:
    """Name of the format whose codes a checkpoint calls so. ValueError if there is none."""
    for name in registry.names("methods.core.formats"):
        if registry.load("methods.core.formats", name).FORMAT.container_type == container_type:
            return name
    raise ValueError(f"no number format has the container type {container_type!r}")
