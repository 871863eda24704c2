"""Token files: one stream of ids per text and tokenizer. It is written once, and each program that reads it cuts windows.

The stream has no beginning-of-sequence token (BOS). Where the tokenizer adds one, the file says which, and every window
begins with it: a model that was trained with BOS predicts badly without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from methods.core.job.files import sha256_file
from methods.core.job.tensors import read_sealed, write_sealed

TEXT = "a"  # that shows what a tokenizer adds


def load_tokenizer(folder: str | Path):
    """The tokenizer of a prepared model or a checkpoint; code that the folder may have is not run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def added_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """Ids that a tokenizer of transformers puts before a text, and behind it. ValueError if the text is not between them."""
    ids, plain = tokenizer(TEXT).input_ids, tokenizer(TEXT, add_special_tokens=False).input_ids
    for start in range(len(ids) - len(plain) + 1):
        if ids[start : start + len(plain)] == plain:
            return ids[:start], ids[start + len(plain) :]
    raise ValueError(f"the tokenizer makes {tokenizer.decode(ids)!r} of {TEXT!r}, in which that is not found")


def added_bos(tokenizer) -> int | None:
    """Id of the BOS token that a tokenizer of transformers puts before a text; None if it puts nothing there.

    ValueError if it puts something else there, with which no window could begin.
    """
    before, _ = added_tokens(tokenizer)
    if before not in ([], [tokenizer.bos_token_id]):
        made = tokenizer.decode(tokenizer(TEXT).input_ids)
        raise ValueError(f"the tokenizer makes {made!r} of {TEXT!r}; a BOS token is all that may stand before")
    return before[0] if before else None


def bos_facts(tokenizer) -> dict[str, str]:
    """What a token file says about BOS: the id that its windows begin with, and the tokenizer's own, or ""."""
    ids = {"bos_token_id": added_bos(tokenizer), "tokenizer_bos_token_id": tokenizer.bos_token_id}
    return {name: "" if token is None else str(token) for name, token in ids.items()}


def write_tokens(path: str | Path, ids: Tensor, info: dict[str, str]) -> None:
    """Store a stream (tokens,) of ids without BOS, and what is known about it (text hash, `bos_facts`, ...)."""
    write_sealed(path, {"input_ids": ids.to(torch.int32)}, info)


def read_tokens(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """The stream (tokens,) int32, and what is known about it. ValueError for a damaged file."""
    tensors, info = read_sealed(path)
    return tensors["input_ids"], info


def read_windows(
    path: str | Path, length: int, bos: Literal["each", "first"] = "each"
) -> tuple[Tensor, dict[str, str]]:
    """The stream as disjoint windows (windows, length) int64, its tail dropped, and its info. ValueError if too short.

    Where the file names a BOS token, each window begins with it, and it counts in the window's length. With `bos` "first",
    as in the papers' perplexity, only the first window does.
    """
    ids, info = read_tokens(path)
    start = [int(info["bos_token_id"])] if info.get("bos_token_id") else []
    if bos == "first":
        ids, start = torch.cat([torch.tensor(start, dtype=ids.dtype), ids]), []
    step = length - len(start)
    if step < 1 or len(ids) < step:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than one window of {length}")
    windows = ids[: len(ids) // step * step].view(-1, step).long()
    return (F.pad(windows, (1, 0), value=start[0]) if start else windows), info


def check_length(model, length: int, what: str) -> None:
    """ValueError if `length` tokens are more than the model's context. what: the name of the length in the message."""
    context = model.config.get_text_config().max_position_embeddings
    if length > context:
        raise ValueError(f"{what} is {length}, longer than the model's context of {context} tokens")


def sample_windows(path: str | Path, samples: int, length: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """`samples` distinct windows of the stream in an order given by `seed`, and what to record about them."""
    windows, info = read_windows(path, length)
    if samples > len(windows):
        raise ValueError(
            f"{path} has {len(windows)} windows of {length} tokens, fewer than the {samples} samples asked for"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    facts = {"sha256": sha256_file(path), "samples": samples, "sequence_length": length}
    return windows[order[:samples]], info | facts
