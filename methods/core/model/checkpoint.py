"""Checkpoints: standard Hugging Face folders, quantized layers in compressed-tensors' pack-quantized container.

`AutoModelForCausalLM.from_pretrained` loads them, and vLLM is meant to (it was not run). `load_model` reads the same files
into `QuantizedLinear` layers, so that an evaluation multiplies with the very numbers that the method made. How layers
quantize their tokens is under `ptqat` in config.json: `load_model` applies it, plain transformers loads the weights and
leaves activations as they are (it has no KV cache quantization before the rotary embedding). Codes of a number format that
compressed-tensors does not have are packed in the same way, under a `type` that transformers refuses to load. This module
is the only place that knows the container.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from methods.core.formats import Format, Packed, make, of_container_type
from methods.core.job.files import RESIDUALS, check_model, read_json
from methods.core.job.runtime import dtype_name
from methods.core.model.anatomy import decoder_blocks, replace_module
from methods.core.model.experts import fused, fused_shapes, is_expert, of_fused, separate, stored_under
from methods.core.model.layers import QuantizedLinear, are_large, quantized_layers, weights_of
from methods.core.scheme import TokenScheme

CONTAINER = "pack-quantized"
OWN = "ptqat-"  # begins the type of numbers in a container that no other program shall take for its own
LARGEST_FILE = 2_000_000_000  # bytes of a file of weights; at least a part of it is in memory while it is written
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
# Of what matrices are stored in, by its name in a safetensors header. (A mask in a file is of another type, and no weight.)
BITS = {"F32": 32, "F16": 16, "BF16": 16, "I32": 32}


def load_model(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """The model of a checkpoint or of a prepared model, in evaluation mode, computing in `dtype`.

    Quantized layers become `QuantizedLinear` with the integers of the file, which stay packed in a large model. What needs no
    conversion stays in the files and is read when it is used (they are memory maps), so that a model may be larger than the
    memory. ValueError if `folder` holds no model, or one that has been changed or damaged.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json")
    check_model(Path(folder))
    own = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(folder, **own)
    if not hasattr(config, "quantization_config"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **own)
        return separate(model).eval()
    quantization = config.quantization_config
    del config.quantization_config
    state = read_tensors(Path(folder))
    layers = {name: _read_layer(state, name, form, dtype) for name, form in _read_formats(state, quantization).items()}
    # transformers wants a weight of the right shape, which the layer then replaces; this one takes no memory.
    nothing = torch.zeros((), dtype=dtype)
    shapes = {name: (m.out_features, m.in_features) for name, m in layers.items()}
    state |= {f"{name}.weight": nothing.expand(shape) for name, shape in shapes.items() if not is_expert(name)}
    state |= {name: nothing.expand(shape) for name, shape in fused_shapes(shapes).items()}
    architecture = getattr(transformers, config.architectures[0])
    model = separate(architecture.from_pretrained(None, config=config, state_dict=state, dtype=dtype))
    tokens = getattr(config, "ptqat", {}).get("tokens", {})
    large = are_large(layers.values())
    for name, layer in layers.items():
        if not large:
            layer.expand()
        for kind, scheme in tokens.get(name, {}).items():
            setattr(layer, kind, TokenScheme(**scheme))
        replace_module(model, name, layer)
    return model.eval()


def formats_of(folder: str | Path) -> list[str]:
    """Names of the number formats of a checkpoint, modules of methods/core/formats."""
    config = read_json(Path(folder) / "config.json")
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    tokens = config.get("ptqat", {}).get("tokens", {}).values()
    weights = {_format_name(group["weights"]) for group in groups}
    return sorted(weights | {scheme.get("format", "integer") for layer in tokens for scheme in layer.values()})


def stored_weights(folder: str | Path, layers: Sequence[str]) -> Iterator[Tensor]:
    """The weights (out, in) of linear layers of a full-precision model in `folder`, read one at a time.

    ValueError for a layer that the files do not have under its name in the model, or under one that ends alike (a model of
    text inside a larger one is stored with other prefixes).
    """
    holder: dict[str, Path] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            holder |= dict.fromkeys(file.keys(), path)
    for layer in layers:
        wanted = [f"{layer}.weight", *(stored_under(layer) if is_expert(layer) else ())]
        alike = [found for key in wanted for found in _alike(holder, key)]
        if len(alike) != 1:
            raise ValueError(f"{folder} has no tensor for {wanted[0]}; candidates: {', '.join(alike) or 'none'}")
        key = alike[0]
        # Opened for each, since what has been read of an open file counts as memory of the process.
        with safe_open(holder[key], framework="pt") as file:
            if is_expert(layer) and not key.endswith(".weight"):
                weight = of_fused(layer, file.get_slice(key))
            else:
                weight = file.get_tensor(key)
        yield weight


def _alike(keys: Iterable[str], key: str) -> list[str]:
    """The key, if it is among the keys; else those that end as it does from `layers.` on."""
    if key in keys:
        return [key]
    tail = key[key.index("layers.") :] if "layers." in key else key
    return [k for k in keys if k.endswith(f".{tail}")]


def load_residuals(model: nn.Module, folder: str | Path) -> None:
    """Give the quantized layers of a checkpoint the `residual` that its method left, if it left one."""
    path = Path(folder) / RESIDUALS
    if path.is_file():
        for name, tensor in load_file(path).items():
            model.get_submodule(name).residual = tensor


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's files by its key, as stored."""
    state: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def _read_formats(state: dict[str, Tensor], quantization: dict[str, Any]) -> dict[str, Format]:
    """Number format of each quantized layer by name. ValueError for a container that this project does not write."""
    if quantization.get("format") != CONTAINER:
        raise ValueError(f"quantization format {quantization.get('format')!r} is not supported; only {CONTAINER} is")
    groups = [(g["targets"], g["weights"]) for g in quantization["config_groups"].values()]
    formats = {}
    for key in state:
        name, _, part = key.rpartition(".")
        if part == "weight_packed":
            args = next(w for targets, w in groups if targets == ["Linear"] or name in targets)
            scale_dtype, group_size = state[f"{name}.weight_scale"].dtype, args["group_size"]
            formats[name] = make(_format_name(args), args["num_bits"], group_size, args["symmetric"], scale_dtype)
    return formats


def _format_name(weights: dict[str, Any]) -> str:
    return of_container_type(weights["type"].removeprefix(OWN))


def _read_layer(state: dict[str, Tensor], name: str, form: Format, dtype: torch.dtype) -> QuantizedLinear:
    """The layer `name`; its tensors are taken out of `state`."""
    words, scale, shape = (state.pop(f"{name}.weight_{part}") for part in ("packed", "scale", "shape"))
    zero_point = state.pop(f"{name}.weight_zero_point", None)
    if zero_point is not None:
        zero_point = form.unpack(zero_point, scale.shape, dim=0)
    bias = state.get(f"{name}.bias")
    packed = Packed(words, torch.Size(shape.tolist()), scale, zero_point, form)
    return QuantizedLinear(packed, None if bias is None else bias.to(dtype), dtype)


def save_checkpoint(
    model: nn.Module, source: str | Path, folder: str | Path, stored: torch.dtype | None = None
) -> None:
    """Write `model` to `folder`. Configuration, dtype and tokenizer come from the prepared model in `source`.

    `stored`: another dtype for what is not quantized. Whether the head is the embedding is the model's own affair.
    """
    from huggingface_hub import save_torch_state_dict

    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True)
    config = read_json(source / "config.json")
    text = config.get("text_config", config)
    if not model.config.get_text_config().tie_word_embeddings:
        config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    if stored is None:
        stored = getattr(torch, config["dtype"])
    else:
        config["dtype"] = text["dtype"] = dtype_name(stored)
    quantized = quantized_layers(model)
    save_torch_state_dict(
        _state_dict(model, quantized, stored), folder, max_shard_size=LARGEST_FILE, metadata={"format": "pt"}
    )
    if quantized:
        config["quantization_config"] = _quantization_config(model, {n: m.format for n, m in quantized.items()})
        config["ptqat"] = {"tokens": {n: _token_schemes(m) for n, m in quantized.items() if _token_schemes(m)}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if residuals := {n: m.residual for n, m in quantized.items() if m.residual is not None}:
        (folder / RESIDUALS).parent.mkdir()
        save_file(residuals, folder / RESIDUALS)
    copy_tokenizer(source, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the chat template and the generation configuration of a model's folder."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copy(path, folder)


def _token_schemes(layer: QuantizedLinear) -> dict[str, dict[str, Any]]:
    """How a layer quantizes its tokens, for config.json."""
    kinds = ("input_tokens", "output_tokens")
    return {kind: asdict(getattr(layer, kind)) for kind in kinds if getattr(layer, kind) is not None}


def _state_dict(model: nn.Module, quantized: dict[str, QuantizedLinear], stored: torch.dtype) -> dict[str, Tensor]:
    state = {name: tensor.to(stored) for name, tensor in fused(model).items()}
    for name, tensor in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer not in quantized and not is_expert(layer):
            state[name] = tensor.to(stored) if tensor.is_floating_point() else tensor
    for name, m in quantized.items():
        state[f"{name}.weight_packed"] = m.packed
        state[f"{name}.weight_scale"] = m.scale
        state[f"{name}.weight_shape"] = torch.tensor([m.out_features, m.in_features])
        if m.zero_point is not None:
            state[f"{name}.weight_zero_point"] = m.format.pack(m.zero_point, dim=0)
        if m.bias is not None:
            state[f"{name}.bias"] = m.bias.to(stored)
    if model.config.get_text_config().tie_word_embeddings:
        for tied in getattr(model, "_tied_weights_keys", None) or []:
            state.pop(tied, None)
    return state


def _quantization_config(model: nn.Module, quantized: dict[str, Format]) -> dict[str, Any]:
    formats = list(dict.fromkeys(quantized.values()))
    # transformers fuses experts as it loads them, and would leave out those that are quantized: it shall refuse the type.
    own = OWN if any(map(is_expert, quantized)) else ""
    groups = {}
    for i, form in enumerate(formats):
        groups[f"group_{i}"] = {
            "format": CONTAINER,
            "targets": ["Linear"] if len(formats) == 1 else [n for n, f in quantized.items() if f == form],
            "weights": {
                "num_bits": form.bits,
                "type": own + form.container_type,
                "symmetric": form.symmetric,
                "strategy": "channel" if form.group_size is None else "group",
                "group_size": form.group_size,
            },
        }
    ignored = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": CONTAINER,
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
        # transformers 5 with compressed-tensors 0.20 loads packed zero points this way only: by default it drops them,
        # with no more than a warning. (With several groups it is this way that goes wrong; WeightScheme forbids both.)
        **({} if all(form.symmetric for form in formats) else {"dequantize": True}),
    }


def stored_sizes(model: nn.Module, folder: str | Path) -> tuple[int, int, int]:
    """Bits stored for the matrices in the decoder blocks, how many weights these have, and the model's parameters.

    Every matrix counts, quantized or not (a router, fused experts), so that bits per weight are those of the whole. Counted
    from the files' headers: codes with their padding, scales, zero points; vectors (norms, biases, shapes) are not.
    """
    prefix, blocks = decoder_blocks(model)
    bits = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                stored = file.get_slice(key)
                if key.startswith(f"{prefix}.") and len(stored.get_shape()) > 1:
                    bits += math.prod(stored.get_shape()) * BITS[stored.get_dtype()]
    quantized = weights_of(quantized_layers(blocks).values())
    weights = quantized + sum(p.numel() for p in blocks.parameters() if p.dim() > 1)
    return bits, weights, quantized + sum(p.numel() for p in model.parameters())
