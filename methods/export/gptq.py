"""The GPTQ checkpoint format of GPTQModel (AutoGPTQ before it), which vLLM, SGLang and transformers read as well.

Of a layer with weight (out, in), b bits and groups of g columns, with codes u = 0 .. 2^b - 1:

    qweight  (in * b / 32, out)      int32   the codes of a column of the transposed matrix, densely from the lowest bit on
    qzeros   (in / g, out * b / 32)  int32   the zero points, along a row
    scales   (in / g, out)           float16
    g_idx    (in,)                   int32   the group of each input column

    w = scales * (u - zero)

Version 1 of the format (`checkpoint_format: gptq`) stores zero - 1, which cannot express a zero point of 0. Version 2
(`gptq_v2`) stores the zero point itself. A symmetric grid, whose zero is 2^(b-1), is written as version 1, which every
program reads. An asymmetric grid is written as version 2.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods.core.job.files import ROOT, read_json
from methods.core.model.containers import float16_scale, read, weight_groups
from methods.export import VLLM_USAGE

if TYPE_CHECKING:
    from torch import Tensor

    from methods.core.model.layers import QuantizedLinear

TAGS = ("gptq",)
BITS = (2, 3, 4, 8)
GROUP_SIZES = (None, 16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel accepts; None per channel
USAGE = (
    """\
```python
from gptqmodel import GPTQModel  # pip install gptqmodel
model = GPTQModel.load("{folder}")
print(model.tokenizer.decode(model.generate("The capital of France is")[0]))
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # pip install transformers optimum gptqmodel
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
    + VLLM_USAGE
)


def check(checkpoint: Path, config: dict[str, Any]) -> None:
    groups = weight_groups(config)
    if len(groups) > 1:
        grids = ", ".join(f"{g['num_bits']} bits in groups of {g['group_size'] or 'a row'}" for g in groups)
        raise ValueError(f"a GPTQ checkpoint has one grid for all layers, this one {grids}; use compressed-tensors")
    bits, size = groups[0]["num_bits"], groups[0]["group_size"]
    if bits not in BITS:
        raise ValueError(f"a GPTQ checkpoint cannot have {bits} bits; valid: {', '.join(map(str, BITS))}")
    if size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES[1:]))
        raise ValueError(f"a GPTQ checkpoint cannot have groups of {size}; valid: {sizes}, or one per channel")


def notes(config: dict[str, Any]) -> list[str]:
    form = _checkpoint_format(weight_groups(config)[0])
    stored = "zero points minus one (version 1)" if form == "gptq" else "zero points as they are (version 2)"
    return [
        f"`checkpoint_format` is `{form}`: {stored}. Scales are float16, exactly equal to the checkpoint's.",
        "A program that multiplies in 16 bits rounds scale times code; what was measured here is not rounded.",
    ]


def write(checkpoint: Path, folder: Path, name: str) -> None:
    import torch
    from huggingface_hub import save_torch_state_dict

    from methods.core.job.log import RunLog
    from methods.core.model.checkpoint import copy_tokenizer

    config = read_json(checkpoint / "config.json")
    weights = weight_groups(config)[0]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    layers, state = read(checkpoint)
    with torch.no_grad():
        for key, layer in RunLog().progress(layers.items(), "packing", "layer"):
            state |= {f"{key}.{part}": t for part, t in _pack(key, layer, _checkpoint_format(weights)).items()}
    save_torch_state_dict(state, folder, metadata={"format": "pt"})
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": _checkpoint_format(weights),
        "bits": weights["num_bits"],
        "group_size": weights["group_size"] or -1,
        "sym": weights["symmetric"],
        "desc_act": False,  # groups are consecutive columns, in whatever order a method quantized them
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"ptqat:{version}"]},
    }
    config.pop("ptqat", None)
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "quantize_config.json").write_text(json.dumps(quantization, indent=2) + "\n")
    copy_tokenizer(checkpoint, folder)


def _checkpoint_format(weights: dict[str, Any]) -> str:
    return "gptq" if weights["symmetric"] else "gptq_v2"


def _pack(name: str, layer: QuantizedLinear, form: str) -> dict[str, Tensor]:
    """The four tensors of a layer. ValueError if it does not fill words of 32 bits, or has a scale that float16 rounds."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, rows, columns = layer.format.bits, layer.out_features, layer.in_features
    if rows % 32 or columns % 32:
        raise ValueError(f"{name} has {rows} x {columns} weights; a GPTQ checkpoint packs them by 32 both ways")
    zero = torch.zeros(layer.scale.shape, dtype=torch.int8) if layer.zero_point is None else layer.zero_point
    if form == "gptq":
        zero = zero - 1
    # compressed-tensors' words have the same bits, and it adds the 2^(b-1) that makes our signed codes unsigned ones.
    return {
        "qweight": pack_to_int32(layer.rounded().codes.T, bits, packed_dim=0),
        "qzeros": pack_to_int32(zero.T, bits, packed_dim=1),
        "scales": float16_scale(name, layer.scale).T.contiguous(),
        "g_idx": torch.arange(columns, dtype=torch.int32) // layer.format.width(columns),
    }
