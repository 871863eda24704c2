"""What the tensors of a checkpoint are, beside what its run.json and its scheme say: each function yields what deviates."""

from __future__ import annotations

import math
import os.path
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from methods.core.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is used: a report verifies no checkpoint and must not wait for it

    from methods.core.formats import Format

PARTS = ("weight_packed", "weight_scale", "weight_zero_point")  # matrices of a quantized layer


def formats(run: dict[str, Any]) -> dict[str, Format]:
    """The format of each quantized layer, as the scheme says; bits that differ by layer are those of run.json."""
    rows = [row for row in run["layers"] if row["bits"]]
    scheme = Scheme.from_dict(run["cell"]["scheme"], run["scheme"], {row["layer"]: row["bits"] for row in rows})
    return {row["layer"]: scheme.number_format(row["layer"], row["shape"][1]) for row in rows}


def values(tensors: Mapping[str, Tensor], forms: Mapping[str, Format]) -> Iterator[str]:
    """Weights are finite, scales not zero, and of the signs that their format has, and codes are codes of it."""
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if tensor.is_floating_point() and tensor.numel():
            low, high = (float(end) for end in tensor.aminmax())  # NaN if there is any; faster than to ask of each
            if not (math.isfinite(low) and math.isfinite(high)):
                yield f"{name} has values that are not finite"
            elif part == "weight_scale" and (tensor == 0).any():
                yield f"{name} has scales of zero"
            elif part == "weight_scale" and low < 0 and not _has_signs(forms[layer]):
                yield f"{name} has negative scales"
        if part == "weight_packed" and not _all_are_codes(tensor, tensors[f"{layer}.weight_shape"], forms[layer]):
            yield f"{name} has codes that are none of {forms[layer].name}"


def _has_signs(form: Format) -> bool:
    import torch

    return any((sign < 0).any() for sign in form.signs(torch.tensor(-1.0), torch.tensor(2.0)))


def _all_are_codes(packed: Tensor, shape: Tensor, form: Format) -> bool:
    import torch

    valid = _codes(form)
    if len(valid) == 2**form.bits:
        return True  # whatever the bits are
    codes = form.unpack(packed, torch.Size(shape.tolist()))
    return bool(torch.isin(codes, torch.tensor(valid, dtype=codes.dtype)).all())


@cache
def _codes(form: Format) -> list[int]:
    """The codes of a format: those whose level has that code."""
    import torch

    codes = []
    for code in range(-(2 ** (form.bits - 1)), 2 ** (form.bits - 1)):
        try:
            level = form.decode(torch.tensor([code], dtype=torch.int8), None, torch.float32)
        except IndexError:
            continue  # beyond a list of levels
        if form.encode(level).item() == code:
            codes.append(code)
    return codes


def layers(tensors: Mapping[str, Tensor], forms: Mapping[str, Format], run: dict[str, Any]) -> Iterator[str]:
    """Quantized layers take as many bits as their format, and the others have their shape."""
    for row in run["layers"]:
        name, shape = row["layer"], row["shape"]
        if name in forms:
            taken = sum(_bits(tensors[key]) for part in PARTS if (key := f"{name}.{part}") in tensors)
            if taken != (expected := forms[name].stored_bits(*shape)):
                yield f"{name} takes {taken:,} bits, but {expected:,} by its scheme"
        elif (own := list(tensors[f"{name}.weight"].shape)) != shape:
            yield f"{name} is {own}, but {shape} in run.json"


def footprint(
    tensors: Mapping[str, Tensor],
    forms: Mapping[str, Format],
    run: dict[str, Any],
    size: int,
    metrics: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """The metrics of the evaluation footprint are those of the tensors and of the size of their files, in bytes."""
    blocks = os.path.commonpath([row["layer"].replace(".", "/") for row in run["layers"]]).replace("/", ".")
    matrices = {name: t for name, t in tensors.items() if name.startswith(f"{blocks}.") and t.dim() > 1}
    plain = sum(t.numel() for name, t in matrices.items() if name.rpartition(".")[2] not in PARTS)
    quantized = sum(math.prod(row["shape"]) for row in run["layers"] if row["layer"] in forms)
    expected = {"size_mb": size / 1e6, "quantized_parameters": quantized}
    expected["bits_per_weight"] = sum(map(_bits, matrices.values())) / (plain + quantized)
    for name, value in expected.items():
        if not math.isclose(metrics[name]["value"], value, rel_tol=1e-9):
            yield f"{name} is {metrics[name]['value']}, but {value} by the files of the checkpoint"


def _bits(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size() * 8
