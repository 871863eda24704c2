"""Prepare a full-precision model: hub repository, local folder or GGUF file -> a folder of safetensors, with a manifest.

python -m workflow.prepare.model --spec '{path: HuggingFaceTB/SmolLM2-135M, revision: main}' --output resources/models/x
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from methods.core.job.files import atomic_path, exclusive, model_hashes, read_json, sha256_file, write_json
from methods.core.job.options import mapping


def prepare(spec: dict[str, Any], folder: Path, widths: Sequence[int] = ()) -> None:
    """Write the model and its tokenizer to `folder`. ValueError if its linear layers have other input widths."""
    check_local(spec["path"])

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    from methods.core.model.experts import separate

    logging.disable_progress_bar()
    # Without a word about code transformers asks on the terminal whether to run a folder's own.
    source = {k: spec[k] for k in ("revision", "gguf_file") if k in spec} | {"trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(spec["path"], **source)
    set_bos(tokenizer, spec)
    gguf = "gguf_file" in spec
    dtype = getattr(torch, spec["dtype"]) if "dtype" in spec else "auto"
    # Safetensors only: a pickle file can run code. A GGUF file is read by the gguf library, without pickle.
    safe = {} if gguf else {"use_safetensors": True}
    print(f"loading {spec['path']}" + (" and dequantizing its GGUF file (about 30 s)" if gguf else ""), file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(spec["path"], dtype=dtype, **safe, **source)
    if gguf:
        model = _plain(model)
    model.save_pretrained(folder)
    check_widths(separate(model), spec["path"], widths)
    tokenizer.save_pretrained(folder)
    if gguf:
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)
    manifest = {
        "spec": spec,
        "revision": getattr(model.config, "_commit_hash", None),
        "parameters": model.num_parameters(),
        **model_hashes(folder),
    }
    if gguf:
        path = Path(spec["path"]) / spec["gguf_file"]
        manifest |= {"gguf_sha256": sha256_file(path), "gguf_bits_per_weight": _gguf_bits_per_weight(path)}
    write_json(folder / "manifest.json", manifest)


def check_local(path: str) -> None:
    """ValueError for a path that can only mean a folder, and there is none; transformers would look for it on the hub. Also
    for a folder whose index or links lead to files elsewhere, which would become part of the prepared model.
    """
    here = path.startswith(("/", "./", "../")) or Path(Path(path).parts[0]).is_dir()
    if here and not Path(path).is_dir():
        raise ValueError(
            f"the model's path {path} is not a folder, and it begins like one of this machine, not of the hub"
        )
    for index in Path(path).glob("*.index.json"):
        for name in read_json(index).get("weight_map", {}).values():
            if Path(name).name != name:
                raise ValueError(f"{index} names the file {name!r}, which is not in its folder")
    own = Path(path).resolve()
    repository = own.parent.parent  # in the cache of huggingface_hub, where files of a snapshot are links to blobs
    cached = own.parent.name == "snapshots" and repository.name.startswith("models--")
    allowed = (own, repository / "blobs") if cached else (own,)
    for file in Path(path).rglob("*"):
        if not any(file.resolve().is_relative_to(folder) for folder in allowed):
            raise ValueError(f"{file} is a link to {file.resolve()}, which is not in the model's folder")


def set_bos(tokenizer, spec: dict[str, Any]) -> None:
    """Make the tokenizer add its BOS token before a text, or not, if the spec has `bos`. ValueError if it cannot.

    Every later step follows the tokenizer, and so do other programs that load its files.
    """
    from methods.core.tokens import added_bos

    wanted = spec.get("bos")
    if wanted is None or wanted == (added_bos(tokenizer) is not None):
        return
    if wanted and tokenizer.bos_token_id is None:
        raise ValueError("bos is true in the configuration, but the tokenizer has no BOS token")
    tokenizer.add_bos_token = wanted
    if wanted != (added_bos(tokenizer) is not None):
        raise ValueError(
            f"bos is {str(wanted).lower()} in the configuration, but {type(tokenizer).__name__} does not change"
        )


def _plain(model):
    """The dequantized model as an ordinary one: a model loaded from GGUF still calls itself quantized and is not saved."""
    config = model.config
    del config.quantization_config
    config.dtype = model.dtype
    plain = type(model)._from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def _gguf_bits_per_weight(path: Path) -> float:
    """Mean bits per weight of the blocks' matrices as a GGUF file stores them."""
    import gguf

    tensors = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1 and t.name.startswith("blk.")]
    return round(8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors), 3)


def check_widths(model, name: str, expected: Sequence[int]) -> None:
    """ValueError if the configuration's `linear_widths`, by which group sizes were checked, are not the model's."""
    from methods.core.model.anatomy import block_linears

    widths = sorted({linear.in_features for linear in block_linears(model).values()})
    if expected and sorted(expected) != widths:
        raise ValueError(f"linear_widths of {name} is {sorted(expected)} in the configuration, but {widths}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", type=mapping, required=True, help="the model's entry in the configuration")
    parser.add_argument("--linear-width", type=int, action="append", default=[], help="checked; once for each width")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    try:
        with exclusive(args.output), atomic_path(args.output) as folder:
            prepare(args.spec, folder, args.linear_width)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except SafetensorError as error:
        sys.exit(f"error: a safetensors file of {args.spec['path']} is broken: {error}")


if __name__ == "__main__":
    main()
