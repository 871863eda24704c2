"""The sizes of a model by its config.json: what memory and time are predicted from. No torch, and no weights are read."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from methods.core.job.files import read_json

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of Llama's kind: attention, and an MLP of three matrices or several such experts.

    hidden, queries, keys, inner: widths of the stream, of all queries, of all keys, and inside an MLP. active: experts that a
    token visits. numbers: bytes of a number in the files.
    """

    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    experts: int
    active: int
    tied: bool
    numbers: int

    @classmethod
    def of(cls, sizes: Mapping[str, Any]) -> Shape:
        """UnknownShape without one of these sizes under a usual name."""
        hidden, heads = _size(sizes, "hidden_size", "n_embd", "d_model"), _size(sizes, *HEADS)
        head = sizes.get("head_dim") or hidden // heads
        experts = _first(sizes, *EXPERTS) or 1
        if experts == 1 and (odd := [key for key, value in sizes.items() if "num_experts" in key and value]):
            raise UnknownShape(f"it has {odd[0]}, but no {' or '.join(EXPERTS)}")
        return cls(
            layers=_size(sizes, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
            hidden=hidden,
            queries=heads * head,
            keys=(sizes.get("num_key_value_heads") or heads) * head,
            inner=_first(sizes, "moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
            vocabulary=_size(sizes, "vocab_size"),
            experts=experts,
            active=(_first(sizes, "num_experts_per_tok", "moe_k") or 1) if experts > 1 else 1,
            tied=sizes.get("tie_word_embeddings", True),
            numbers=4 if "float32" in (sizes.get("dtype"), sizes.get("torch_dtype")) else 2,
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(out, in) of the linear layers of a block."""
        h = self.hidden
        attention = ((self.queries, h), (self.keys, h), (self.keys, h), (h, self.queries))
        return attention + ((self.inner, h), (self.inner, h), (h, self.inner)) * self.experts

    @property
    def weights(self) -> int:
        """Of the linear layers of all blocks: what is quantized."""
        return self.layers * sum(out * width for out, width in self.linears)

    @property
    def others(self) -> int:
        """Numbers of the embedding and of a head of its own; those of the norms are too few to count."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def visited(self) -> int:
        """Weights that a token is multiplied with, the head included."""
        idle = (self.experts - self.active) * 3 * self.hidden * self.inner
        return self.weights - self.layers * idle + self.vocabulary * self.hidden

    @property
    def widest(self) -> int:
        """The most inputs that a linear layer has."""
        return max(width for _, width in self.linears)

    @property
    def largest(self) -> int:
        """Weights of the largest linear layer."""
        return max(out * width for out, width in self.linears)

    def low_rank(self, rank: int) -> int:
        """Numbers of low-rank terms of so many columns in all linear layers."""
        return self.layers * rank * sum(out + width for out, width in self.linears)


class UnknownShape(ValueError):
    """A config.json without one of the sizes of a Shape."""


def _first(sizes: Mapping[str, Any], *names: str) -> int | None:
    return next((sizes[name] for name in names if isinstance(sizes.get(name), int)), None)


def _size(sizes: Mapping[str, Any], *names: str) -> int:
    if (size := _first(sizes, *names)) is None:
        raise UnknownShape(f"it has no {' or '.join(names)}")
    return size


def sizes_in(folder: str | Path) -> dict[str, Any]:
    """What the config.json of a folder says, that of the text model where it is a part; empty without one.

    ValueError if it is not the configuration of a model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not the configuration of a model")
    return config | config.get("text_config", {})


@cache
def shape_of(folder: str | Path) -> Shape:
    """The shape of the model in a folder. FileNotFoundError without a config.json, UnknownShape for one of another kind."""
    sizes = sizes_in(folder)
    if not sizes:
        raise FileNotFoundError(errno.ENOENT, "no config.json", str(folder))
    try:
        return Shape.of(sizes)
    except UnknownShape as error:
        raise UnknownShape(f"{folder}/config.json: {error}") from None
