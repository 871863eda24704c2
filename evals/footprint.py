"""What a checkpoint takes: size on disk, true bits per weight, and bytes of KV cache per token.

Bits per weight are those stored for the matrices of the decoder blocks, quantized or not, scales, zero points and padding
included, over their weights; embeddings, norms and head do not count. The keys of a token in a layer, and its values, are a
row as its format stores it: codes, a scale in two bytes, a zero point if it is asymmetric.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from evals import Result, metric
from methods.core.job.registry import Evaluation
from methods.core.job.runtime import stored_dtype
from methods.core.model.activations import KEY_VALUE_LAYERS
from methods.core.model.anatomy import head_width
from methods.core.model.checkpoint import stored_sizes
from methods.core.model.layers import quantized_layers, weights_of

EVALUATION = Evaluation()


@dataclass(frozen=True)
class Config:
    pass


def evaluate(model, checkpoint, config, data, log) -> Result:
    bits, weights, parameters = stored_sizes(model, checkpoint)
    quantized = weights_of(quantized_layers(model).values())
    values = {
        "size_mb": (sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 1e6, "MB"),
        "bits_per_weight": (bits / weights, "bits"),
        "quantized_parameters": (quantized, "parameters"),
        "unquantized_parameters": (parameters - quantized, "parameters"),
        "kv_cache_bytes": (cache_bytes(model, stored_dtype(checkpoint)), "bytes per token"),
    }
    metrics = {name: metric(value, higher_is_better=False, unit=unit) for name, (value, unit) in values.items()}
    return Result("stored", metrics, n=parameters, partial=False, data={})


def cache_bytes(model, dtype: torch.dtype) -> float:
    """Bytes that keys and values of one token take in all layers; `dtype` is theirs if they are not quantized."""
    c = model.config.get_text_config()
    width = head_width(model) * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
    schemes = [getattr(m, "output_tokens", None) for n, m in model.named_modules() if n.endswith(KEY_VALUE_LAYERS)]
    scheme = next((s for s in schemes if s is not None), None)
    if scheme is None:
        bits = width * dtype.itemsize * 8
    else:
        bits = dataclasses.replace(scheme.number_format(), scale_dtype=torch.bfloat16).stored_bits(1, width)
    return c.num_hidden_layers * 2 * bits / 8
