"""compressed-tensors, pack-quantized, which transformers, vLLM and llm-compressor read. A checkpoint has it already."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from methods.core.job.files import read_json
from methods.core.model.containers import weight_groups
from methods.export import VLLM_USAGE

TAGS = ("compressed-tensors",)
VLLM_BITS = {4, 8}  # bits that vLLM's weight-only kernels for compressed-tensors have had from the beginning
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # vLLM makes one layer of each tuple
USAGE = (
    """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer  # pip install transformers compressed-tensors
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
    + VLLM_USAGE
)


def check(checkpoint: Path, config: dict[str, Any]) -> None:
    groups = weight_groups(config)
    if len(groups) > 1 and not all(group["symmetric"] for group in groups):
        # Without `dequantize`, transformers 5 drops the zero points. With it, it uses one group's grid for all layers.
        raise ValueError(
            f"transformers cannot load zero points of {len(groups)} different grids; use one grid, or symmetric ones"
        )


def notes(config: dict[str, Any]) -> list[str]:
    lines = ["The files are those of the checkpoint: packed integer codes, scales, and the other tensors as they were."]
    if not all(group["symmetric"] for group in weight_groups(config)):
        lines.append(
            "transformers computes weights with zero points in the dtype of the scales when it loads them, whatever dtype is "
            "asked for; in float32 these are rounded, and what was measured here in float32 is not."
        )
    if others := sorted({group["num_bits"] for group in weight_groups(config)} - VLLM_BITS):
        lines.append(
            f"vLLM's kernels for this format know {' and '.join(map(str, sorted(VLLM_BITS)))} bits; whether its version has "
            f"any for {', '.join(map(str, others))} is to be tried."
        )
    targets = [group["targets"] for group in config["quantization_config"]["config_groups"].values()]
    grid_of = {name: index for index, names in enumerate(targets) for name in names}
    for parts in FUSED:
        alike = [{grid_of.get(name.replace(parts[0], part)) for part in parts} for name in grid_of if parts[0] in name]
        if any(len(grids) > 1 for grids in alike):
            lines.append(
                f"{', '.join(parts)} of a block have different grids in some blocks: transformers loads that, but vLLM, "
                "which fuses these layers, wants one grid for them."
            )
    return lines


def write(checkpoint: Path, folder: Path, name: str) -> None:
    from methods.core.model.checkpoint import copy_tokenizer

    for pattern in ("*.safetensors", "*.safetensors.index.json"):
        for path in checkpoint.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    config = read_json(checkpoint / "config.json")
    config.pop("ptqat", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    copy_tokenizer(checkpoint, folder)
