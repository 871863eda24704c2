"""The sizes of a model by its config.json: what memory and time are predicted from. No torch, and no weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    context: int
    experts: int
    active: int
    tied: bool
    numbers: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """ValueError for a config.json without one of these sizes under a usual name."""
        text = {**config, **config.get("text_config", {})}
        hidden = _size(text, "hidden_size", "n_embd")
        heads = _size(text, "num_attention_heads", "n_head")
        head = text.get("head_dim") or hidden // heads
        experts = next(
            (text[name] for name in ("num_local_experts", "num_experts", "n_routed_experts") if text.get(name)), 1
        )
        return cls(
            layers=_size(text, "num_hidden_layers", "n_layer"),
            hidden=hidden,
            queries=heads * head,
            keys=(text.get("num_key_value_heads") or heads) * head,
            inner=text.get("moe_intermediate_size")
            or text.get("intermediate_size")
            or text.get("n_inner")
            or 4 * hidden,
            vocabulary=_size(text, "vocab_size"),
            context=_size(text, "max_position_embeddings", "n_positions"),
            experts=experts,
            active=text.get("num_experts_per_tok", 1) if experts > 1 else 1,
            tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", True)),
            numbers=4 if "float32" in (config.get("dtype"), config.get("torch_dtype")) else 2,
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


def _size(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int):
            return config[name]
    raise ValueError(f"it has no {' or '.join(names)}")


def shape_of(folder: str | Path) -> Shape:
    """The shape of the model in a folder. FileNotFoundError without a config.json, ValueError for one of another kind."""
    path = Path(folder) / "config.json"
    try:
        return Shape.of(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
