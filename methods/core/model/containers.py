"""What containers of other programs need of a checkpoint: how its layers are quantized, and their integers and scales.

torch is imported inside functions only, so that a mistake is found before the seconds that this costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.core.job import registry

if TYPE_CHECKING:
    from torch import Tensor

    from methods.core.model.layers import QuantizedLinear


def weight_groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """`weights` of each group of layers in a checkpoint's config.json: num_bits, group_size (None per channel), symmetric.

    ValueError if nothing is quantized, or if more than weights is.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        raise ValueError("there is nothing quantized to export: the checkpoint is in full precision")
    container = registry.constants("methods.core.model", "checkpoint")
    if quantization.get("format") != container["CONTAINER"]:
        raise ValueError(f"quantization format {quantization.get('format')!r} is not one that this project writes")
    if any(group["weights"]["type"].startswith(container["OWN"]) for group in quantization["config_groups"].values()):
        raise ValueError(
            "quantized experts of a mixture are not exported: other programs differ in what they call them"
        )
    if others := sorted({g["weights"]["type"] for g in quantization["config_groups"].values()} - {"int"}):
        raise ValueError(f"the checkpoint's number format is {', '.join(others)}; exports hold integers")
    # What only load_model applies would be lost on the way, and the numbers of the card would be another model's.
    if applied := sorted(key for key, value in config.get("ptqat", {}).items() if value):
        raise ValueError(
            f"the checkpoint quantizes more than weights (ptqat: {', '.join(applied)} in config.json, that is activations "
            "or KV cache), which no program that reads these formats would do; export a scheme of weights only"
        )
    return [group["weights"] for group in quantization["config_groups"].values()]


def read(checkpoint: Path) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """The quantized layers of a checkpoint by name, and by key every other tensor, as stored."""
    from methods.core.job.runtime import stored_dtype
    from methods.core.model.checkpoint import load_model, read_tensors
    from methods.core.model.layers import quantized_layers

    model = load_model(checkpoint, stored_dtype(checkpoint))
    layers = quantized_layers(model)
    return layers, {key: t for key, t in read_tensors(checkpoint).items() if not _is_of_layer(key, layers)}


def _is_of_layer(key: str, layers) -> bool:
    name, _, part = key.rpartition(".")
    return name in layers and part != "bias"


def float16_scale(name: str, scale: Tensor) -> Tensor:
    """`scale` in float16. ValueError if that rounds one: float16 reaches no further than 65504 and is coarse below 6e-5."""
    import torch

    half = scale.to(torch.float16)
    if (changed := half.float() != scale.float()).any():
        raise ValueError(
            f"{name}: {int(changed.sum())} of {scale.numel()} scales are not float16 numbers, for example "
            f"{scale[changed][0].item():.9g}; format compressed-tensors keeps them, and a scheme with "
            "scale_dtype: float16 makes none"
        )
    return half
