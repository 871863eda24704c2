"""Linear layers on packed weights: PyTorch's own weight-only kernels, 4 bits in groups and 8 bits per channel.

They multiply bf16 activations with integers that stay packed in memory, which is what makes decoding faster than with 16-bit
weights. They compute `x W^T` with the scales and integers of a checkpoint's layer. The sums, and in int4 the products of
scale and zero point, are rounded otherwise than in fp32.

    int4   codes of 2 to 4 bits, in 4 bits each; groups of 32, 64, 128 or 256, or per channel; zero points
    int8   codes of 5 to 8 bits, in 8 bits each; per channel, symmetric
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from methods.core.job.runtime import dtype_name
from methods.core.model.anatomy import replace_module
from methods.core.model.layers import QuantizedLinear, quantized_layers

GROUPS = (256, 128, 64, 32)  # group sizes of the int4 kernel
TILES = 8  # inner tiles of the CUDA layout of int4 weights


class NoKernel(ValueError):
    """There is no kernel here for a layer; the message says what it lacks."""


class Int4Linear(nn.Module):
    """`w = (q - 8) * scale + zero` with q = 0 .. 15; scale and zero bf16 for each group."""

    kind = "int4"

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        group = layer.format.group_size or next((g for g in GROUPS if layer.in_features % g == 0), None)
        if group not in GROUPS or layer.format.bits > 4:
            raise NoKernel(f"int4 has groups of {', '.join(map(str, GROUPS))} and codes of up to 4 bits")
        _require_bfloat16(layer.scale, self.kind)
        self.group, self.in_features, self.out_features = group, layer.in_features, layer.out_features
        repeats = layer.in_features // group // layer.scale.shape[1]  # a channel is several groups of one scale
        scale = layer.scale.repeat_interleave(repeats, dim=1)
        zero = torch.zeros_like(scale)
        if layer.zero_point is not None:
            zero = -scale.float() * layer.zero_point.repeat_interleave(repeats, dim=1)
        both = torch.stack([scale, zero.to(scale.dtype)], dim=-1).transpose(0, 1).contiguous()
        self.register_buffer("scale_and_zero", both)  # (groups, out, 2)
        codes = layer.rounded().codes.int() + 8
        if codes.is_cuda:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(pairs, TILES))
            self.product = torch.ops.aten._weight_int4pack_mm
        else:
            self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, TILES))
            self.product = torch.ops.aten._weight_int4pack_mm_for_cpu
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.flatten(0, -2), self.packed, self.group, self.scale_and_zero)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """`w = q * scale` with q = -128 .. 127 and one bf16 scale per output channel."""

    kind = "int8"

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        if layer.format.group_size is not None or not layer.format.symmetric:
            raise NoKernel("int8 has one scale per channel and no zero points")
        _require_bfloat16(layer.scale, self.kind)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("packed", layer.rounded().codes)
        self.register_buffer("scale", layer.scale[:, 0].contiguous())
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.packed, self.scale)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _require_bfloat16(scale: Tensor, kind: str) -> None:
    if scale.dtype != torch.bfloat16:
        raise NoKernel(f"{kind} has bfloat16 scales, not {dtype_name(scale.dtype)}")


@torch.no_grad()
def pack(model: nn.Module) -> str:
    """Replace every quantized layer of a bf16 model by a packed one, and return the kernels' names.

    NoKernel, naming layer and format, if this machine has no kernel for a layer.
    """
    kinds = set()
    for name, layer in quantized_layers(model).items():
        try:
            if layer.format.name != "integer":
                raise NoKernel(f"they multiply with integers, not with {layer.format.name}")
            packed = (Int4Linear if layer.format.bits <= 4 else Int8Linear)(layer)
            packed(torch.zeros(1, 1, layer.in_features, dtype=torch.bfloat16, device=layer.scale.device))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (NoKernel, RuntimeError, NotImplementedError) as error:  # the operators raise what their shapes forbid
            groups = f"groups of {layer.format.group_size}" if layer.format.group_size else "one group per channel"
            reason = str(error).splitlines()[0]
            raise NoKernel(f"{name} ({layer.format.bits} bits, {groups}): {reason}") from None
        kinds.add(packed.kind)
        replace_module(model, name, packed)
    return ", ".join(sorted(kinds))
