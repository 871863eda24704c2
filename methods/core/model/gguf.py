"""GGUF, for llama.cpp and what is built on it. One file holds the model, its configuration and its tokenizer.

GGUF has no type for arbitrary grids, but three that hold ours exactly: blocks of 32 columns with a float16 scale and
signed levels, `w = scale * level`, where level is code - zero_point.

    type   levels        bits per weight   holds symmetric codes of   asymmetric codes of
    Q4_0   -8 .. 7       4.5               2, 3, 4 bits               2, 3 bits
    Q5_0   -16 .. 15     5.5               5 bits                     4 bits
    Q8_0   -128 .. 127   8.5               6, 7, 8 bits               5, 6, 7 bits

Q4_1, the asymmetric type, is not used: it stores the minimum -scale * zero_point in float16, which rounds some. A group
of 64 columns is two blocks with the same scale. Norms are stored in float32, the embedding and the head as they are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.core.job.files import read_json
from methods.core.model.containers import float16_scale, read, weight_groups

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from methods.core.model.layers import QuantizedLinear

FILE = "model.gguf"
BLOCK = 32
TYPES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # levels are -half .. half - 1
ARCHITECTURES = ("LlamaForCausalLM",)
ROPE_TYPES = ("default", "llama3")
# How text is split before BPE: llama.cpp's name, and the steps in tokenizer.json. The first digits of its sha256 stand for a
# regular expression.
PRE_TOKENIZERS = {
    "gpt-2": [("ByteLevel", True)],
    "smollm": [("Digits", True), ("ByteLevel", True)],
    "llama-bpe": [("Split", "d98f9631be1e9607"), ("ByteLevel", False)],
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens


def check(checkpoint: Path, config: dict[str, Any]) -> None:
    """ValueError for a quantized checkpoint that the format cannot hold."""
    for group in weight_groups(config):
        _type_of(group)
        if (group["group_size"] or BLOCK) % BLOCK:
            raise ValueError(
                f"GGUF has blocks of {BLOCK} columns; groups of {group['group_size']} do not consist of them"
            )
    check_model(checkpoint, config)


def check_model(checkpoint: Path, config: dict[str, Any]) -> None:
    """ValueError for a model or tokenizer that the format cannot hold, quantized or not."""
    architecture = config["architectures"][0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"no GGUF export of {architecture}; supported: {', '.join(ARCHITECTURES)}")
    rope = _rope(config)
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"no GGUF export of rope_type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}")
    if config["hidden_act"] != "silu":
        raise ValueError(f"no GGUF export of hidden_act {config['hidden_act']!r}; supported: silu")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(
            "no GGUF export of linear layers with a bias: transformers would drop it when it loads the file"
        )
    if not (checkpoint / "tokenizer.json").is_file():
        raise ValueError(f"a GGUF file carries its tokenizer, and {checkpoint} has no tokenizer.json")
    tokenizer = read_json(checkpoint / "tokenizer.json")
    _pre_tokenizer(tokenizer)
    if (highest := max(_vocabulary(tokenizer).values())) >= config["vocab_size"]:
        raise ValueError(
            f"the tokenizer has an id {highest}, but the model's vocabulary is {config['vocab_size']} tokens"
        )


def notes(config: dict[str, Any]) -> list[str]:
    types = sorted({_type_of(group) for group in weight_groups(config)})
    lines = [
        f"Quantized layers are stored as {', '.join(types)}, which hold the checkpoint's integers and scales exactly, in "
        "more bits per weight than the checkpoint has; norms are float32, the embedding and the head as they were.",
        "llama.cpp multiplies these types with activations that it rounds to 8 bits (a scale per 32), so its logits are "
        "not exactly those that were measured here.",
    ]
    if _rope(config)["rope_type"] == "llama3":
        lines.append(
            "The file slows the lower rotary frequencies down as Llama 3.1 does; llama.cpp reads that, transformers does "
            "not, and gives other logits for this file."
        )
    return lines


def write(checkpoint: Path, folder: Path, name: str) -> None:
    """Write FOLDER/model.gguf of a checkpoint, quantized or not. ValueError if a number would have to be rounded."""
    import gguf
    import torch
    from transformers import AutoConfig

    from methods.core.job.log import RunLog

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    layers, others = read(checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_name(name)
    _add_configuration(writer, config)
    _add_tokenizer(writer, checkpoint, config.vocab_size)
    weights = Counter()
    for layer in layers.values():
        weights[_type_for(layer.format.bits, layer.format.symmetric)] += layer.out_features * layer.in_features
    if weights:
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{weights.most_common(1)[0][0]}"])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with torch.no_grad():
        for key in RunLog().progress([*layers, *others], "packing", "tensor"):
            module = key.removesuffix(".weight")
            if (target := names.get_name(module)) is None:
                raise ValueError(f"llama.cpp has no tensor for {key}")
            if key in layers:
                kind = _type_for(layers[key].format.bits, layers[key].format.symmetric)
                data = torch.from_numpy(_blocks(key, layers[key], kind))
            else:
                kind, data = _plain(others[key])
            if (part := module.rpartition(".")[2]) in heads:
                data = _interleave(data, heads[part])
            writer.add_tensor(f"{target}.weight", data.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind])
    if _rope(config.to_dict())["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _rope_factors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _type_of(group: dict[str, Any]) -> str:
    return _type_for(group["num_bits"], group["symmetric"])


def _type_for(bits: int, symmetric: bool) -> str:
    """The smallest type that holds every level of a grid. ValueError if none does."""
    reach = 2 ** (bits - 1) if symmetric else 2**bits  # code - zero_point is -reach .. reach - 1, or one less
    for name, half in TYPES.items():
        if reach <= half:
            return name
    raise ValueError(f"no GGUF type holds {bits}-bit codes with zero points exactly; valid: 2 to 7 bits, or symmetric")


def _blocks(name: str, layer: QuantizedLinear, kind: str) -> np.ndarray:
    """The bytes (out, in / 32 * bytes per block) of a layer in the block type `kind`: scale, high bits, low bits."""
    import numpy as np

    rows, columns = layer.out_features, layer.in_features
    if columns % BLOCK:
        raise ValueError(f"{name} is {columns} columns wide; GGUF has blocks of {BLOCK}")
    scale = float16_scale(name, layer.scale)
    levels = layer.rounded().codes.short().unflatten(1, (scale.shape[1], -1))
    if layer.zero_point is not None:
        levels = levels - layer.zero_point.short().unsqueeze(-1)
    levels = levels.reshape(rows, -1, BLOCK).numpy()
    scale = scale.repeat_interleave(levels.shape[1] // scale.shape[1], dim=1).numpy()[..., None].view(np.uint8)
    if kind == "Q8_0":
        parts = [levels.astype(np.int8).view(np.uint8)]
    else:
        codes = (levels + TYPES[kind]).astype(np.uint8)
        low, high = codes & 15, codes >> 4
        parts = [low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4]
        if kind == "Q5_0":
            parts.insert(0, np.packbits(high, axis=-1, bitorder="little"))
    return np.concatenate([scale, *parts], axis=-1).reshape(rows, -1)


def _plain(tensor: Tensor) -> tuple[str, Tensor]:
    """Type and data of a tensor that is not quantized: vectors in float32, matrices as stored, as bytes if bfloat16."""
    import torch

    if tensor.dim() == 1 or tensor.dtype == torch.float32:
        return "F32", tensor.float()
    if tensor.dtype == torch.bfloat16:
        return "BF16", tensor.view(torch.uint8)
    return "F16", tensor


def _interleave(rows: Tensor, heads: int) -> Tensor:
    """The rows of q_proj or k_proj as llama.cpp wants them.

    Its rotary embedding rotates the neighbors (0, 1), (2, 3), ...; that of transformers rotates (0, d/2), (1, d/2 + 1), ...
    """
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """rope_type, rope_theta and the rest, from a config.json of transformers 5 or before."""
    rope = config.get("rope_parameters") or (config.get("rope_scaling") or {}) | {
        "rope_theta": config.get("rope_theta")
    }
    return {"rope_type": "default"} | rope


def _rope_factors(config) -> np.ndarray:
    """Divisors of the rotary frequencies (head_dim / 2,), float32: Llama 3.1 slows the lower frequencies down."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -steps / scaled).numpy()


def _add_configuration(writer, config) -> None:
    """Write the metadata from which llama.cpp and transformers rebuild the configuration."""
    writer.add_type("model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    return tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _pre_tokenizer(tokenizer: dict[str, Any]) -> str:
    """What llama.cpp calls this tokenizer's way of splitting text. ValueError if it is not in PRE_TOKENIZERS."""
    pre = tokenizer["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    splits = [(step.get("type"), _setting(step)) for step in steps]
    names = [name for name, known in PRE_TOKENIZERS.items() if known == splits]
    spaced = any(step.get("add_prefix_space") for step in steps)
    if tokenizer["model"]["type"] != "BPE" or tokenizer["normalizer"] or spaced or not names:
        raise ValueError(
            f"no GGUF export of this tokenizer ({tokenizer['model']['type']}, split by {splits}); supported: byte-level BPE "
            f"that splits as {', '.join(PRE_TOKENIZERS)}"
        )
    return names[0]


def _setting(step: dict[str, Any]) -> bool | str | None:
    """The setting that distinguishes a step of a pre-tokenizer from others of its type."""
    if step.get("type") == "Split":
        return hashlib.sha256(step["pattern"].get("Regex", "").encode()).hexdigest()[:16]
    return step.get({"ByteLevel": "use_regex", "Digits": "individual_digits"}.get(step.get("type")))


def _add_tokenizer(writer, checkpoint: Path, size: int) -> None:
    """The tokenizer, as llama.cpp stores a byte-level BPE. Ids of the model that the tokenizer does not use get names too."""
    from tokenizers import Tokenizer

    tokenizer = read_json(checkpoint / "tokenizer.json")
    vocabulary = _vocabulary(tokenizer)
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, NORMAL
    for token in tokenizer["added_tokens"]:
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])

    settings_file, template = checkpoint / "tokenizer_config.json", checkpoint / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    ids = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{kind}_token")
        ids[kind] = vocabulary.get(token["content"] if isinstance(token, dict) else token)
        if ids[kind] is not None:
            getattr(writer, f"add_{kind}_token_id")(ids[kind])
    first = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode("a").ids[0]
    writer.add_add_bos_token(first == ids["bos"])
    writer.add_add_space_prefix(False)
    if text := template.read_text() if template.is_file() else settings.get("chat_template"):
        writer.add_chat_template(text)
