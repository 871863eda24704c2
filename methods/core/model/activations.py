"""Dynamic per-token quantization of activations: the inputs of quantized layers, and keys and values for the cache.

Each token is a row with a scale of its own, taken from its range as it comes (min-max, no clipping), as in LLM-QAT
(arXiv 2305.17888) and its baselines.
"""

from __future__ import annotations

from torch import Tensor, nn

from methods.core.model.anatomy import block_linears
from methods.core.scheme import Scheme, TokenScheme

KEY_VALUE_LAYERS = ("k_proj", "v_proj")
KEY_NORMS = ("k_norm", "k_layernorm")  # as transformers calls the norm of the keys in Qwen3 and Gemma 3, and in Phi


def fake_quantize_tokens(x: Tensor, scheme: TokenScheme) -> Tensor:
    """Round each token, the last dimension of x, with a scale and a zero point of its own range, which always holds 0.

    Computed in fp32, returned in x's dtype.
    """
    values, form = x.float(), scheme.number_format()
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale, zero_point = form.scale_of_range(low, high)
    levels = form.snap_(values / scale, None if zero_point is None else zero_point.float())
    return (levels * scale).to(x.dtype)


def mark_layers(model: nn.Module, scheme: Scheme) -> None:
    """Note on each linear layer of the decoder blocks how its tokens are quantized; `QuantizedLinear` takes it over.

    Every input is quantized when the scheme has activations; the outputs of k_proj and v_proj, before the rotary
    embedding, when it has a KV cache. ValueError if the model has no such layers, or normalizes its keys after k_proj: the
    norm of each head would follow the rounding, while what a cache holds is rounded after it.
    """
    linears = block_linears(model)
    caching = [linear for name, linear in linears.items() if name.endswith(KEY_VALUE_LAYERS)]
    if scheme.kv_cache is not None and not caching:
        raise ValueError(f"scheme {scheme.name!r} quantizes the KV cache, but no layer is called {KEY_VALUE_LAYERS}")
    norms = [name for name, _ in model.named_modules() if name.endswith(KEY_NORMS)]
    if scheme.kv_cache is not None and norms:
        raise ValueError(
            f"scheme {scheme.name!r} quantizes the KV cache, but the model normalizes keys after k_proj ({norms[0]}): a "
            "cache holds them after that, and rounding them there is not implemented. Use a scheme without kv_cache"
        )
    for linear in linears.values():
        linear.input_tokens = scheme.activations
        linear.output_tokens = scheme.kv_cache if linear in caching else None


def carries_tokens(model: nn.Module, name: str, scheme: Scheme) -> bool:
    """Whether a layer quantizes its tokens as the scheme says."""
    layer = model.get_submodule(name)
    output = scheme.kv_cache if name.endswith(KEY_VALUE_LAYERS) else None
    return (getattr(layer, "input_tokens", None), getattr(layer, "output_tokens", None)) == (scheme.activations, output)


def copy_marks(source: nn.Module, target: nn.Module) -> None:
    """Let `target`, which takes the place of `source`, quantize its tokens in the same way."""
    target.input_tokens = getattr(source, "input_tokens", None)
    target.output_tokens = getattr(source, "output_tokens", None)
