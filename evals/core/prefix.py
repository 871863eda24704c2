"""Log-likelihoods of many continuations, every shared prefix computed once.

The choices of a question share its text, and the questions of a few-shot subject share their examples: most tokens of a
benchmark's requests stand in prefixes that several requests have. Here the sequences form a trie. A node of it is a token
together with all tokens before it. The nodes are computed in depth-first order, one chunk per forward pass. From earlier
chunks, a chunk needs only the keys and values on the path from the root to its first node. So the cache holds one path,
nothing is padded and nothing is computed twice. Within a chunk, the attention mask lets a token see its ancestors only.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Minimum tokens per forward pass; `_chunk_length` says when a chunk is longer. Attention is computed between all tokens of a
# chunk, and the mask hides most of it: on a CPU longer chunks cost more than they save, while a GPU is idle in shorter ones.
MINIMUM_CHUNK = {"cpu": 256, "cuda": 4096}
LARGEST_LOGITS = 2**28  # of a chunk: 1 GiB in fp32


@dataclass(frozen=True)
class Trie:
    """Distinct prefixes of some sequences in depth-first order: (nodes,) each.

    `end[a]` is one past the last descendant of node a: node a is node i, or an ancestor of it, exactly if a <= i < end[a].
    """

    tokens: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    tails: list[np.ndarray]  # for each sequence, the nodes of its last tokens

    @classmethod
    def of(cls, sequences: list[list[int]], counts: list[int]) -> Trie:
        """The trie of the sequences; the tail of sequence i is its last `counts[i]` tokens."""
        tokens, depths, nodes = [], [], 0
        end = np.empty(sum(map(len, sequences)), np.int64)
        path = np.empty(max(map(len, sequences)), np.int64)  # the nodes of the current sequence
        tails: dict[int, np.ndarray] = {}
        previous = np.empty(0, np.int64)
        # In sorted order, a sequence shares no longer prefix with any earlier one than with the previous one.
        for index in sorted(range(len(sequences)), key=sequences.__getitem__):
            sequence = np.asarray(sequences[index], np.int64)
            shared = _common_prefix(previous, sequence)
            # The previous sequence's nodes beyond the shared prefix get no more descendants.
            end[path[shared : len(previous)]] = nodes
            new = len(sequence) - shared
            path[shared : len(sequence)] = np.arange(nodes, nodes + new)
            tokens.append(sequence[shared:])
            depths.append(np.arange(shared, len(sequence)))
            nodes += new
            tails[index] = path[len(sequence) - counts[index] : len(sequence)].copy()
            previous = sequence
        end[path[: len(previous)]] = nodes
        return cls(np.concatenate(tokens), np.concatenate(depths), end[:nodes], [tails[i] for i in range(len(tails))])

    def __len__(self) -> int:
        return len(self.tokens)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the longest common prefix."""
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


def attention_reach(model, longest: int) -> dict[str, int]:
    """By the kind of attention that layers of the model have, how many tokens one sees, itself included, of up to `longest`.

    ValueError if the model's attention cannot be given a mask over a trie.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids, which scoring with shared prefixes needs")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{name} has layers of {', '.join(sorted(others))}; scoring with shared prefixes needs attention"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        start = parameters.get("original_max_position_embeddings")
        if parameters.get("rope_type") == "longrope" and longest > start:
            raise ValueError(
                f"{name} has other rotary frequencies in passes of more than {start} tokens, and a request has {longest}; "
                "a short one that shares a prefix with it would get the long one's"
            )
    reach = {"full_attention": longest, "sliding_attention": min(window or longest, longest)}
    return {kind: reach[kind] for kind in sorted(kinds)}


@torch.inference_mode()
def log_likelihoods(model, requests: list[tuple[list[int], list[int]]], log) -> list[tuple[float, bool]]:
    """For each request (context tokens, continuation tokens): the log-likelihood of the continuation in nats, and whether it
    is greedy, that is, each of its tokens is the model's most likely one.

    Logits are computed for the tokens of continuations only, their log-softmax in fp32. ValueError for an empty context or
    continuation, for a model whose attention cannot be given the mask, and for log-likelihoods that are not finite.
    """
    if not requests:
        return []
    for context, continuation in requests:
        if not context or not continuation:
            raise ValueError("a request has an empty context or continuation")
    # The last token of a continuation is predicted but not read, so its sequence ends before it.
    sequences = [context + continuation[:-1] for context, continuation in requests]
    trie = Trie.of(sequences, [len(continuation) for _, continuation in requests])
    reach = attention_reach(model, int(trie.depth.max()) + 1)
    nodes = np.concatenate(trie.tails)
    targets = np.concatenate([continuation for _, continuation in requests])
    order = np.argsort(nodes, kind="stable")
    values, greedy = _score_nodes(model, trie, reach, nodes[order], targets[order], log)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} log-likelihoods are not finite")
    inverse = np.argsort(order, kind="stable")
    stops = np.cumsum([len(continuation) for _, continuation in requests])[:-1]
    per_request = zip(np.split(values[inverse], stops), np.split(greedy[inverse], stops), strict=True)
    return [(float(value.sum()), bool(first.all())) for value, first in per_request]


def _score_nodes(
    model, trie: Trie, reach: dict[str, int], nodes: np.ndarray, targets: np.ndarray, log
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of token `targets[i]` after node `nodes[i]`, fp64, and whether it is the most likely: (targets,) each.

    reach: as from `attention_reach`. nodes: ascending; a node is named once for each of its targets.
    """
    from transformers import DynamicCache

    device = model.device
    minimum = MINIMUM_CHUNK.get(device.type, MINIMUM_CHUNK["cpu"])
    largest = max(1, LARGEST_LOGITS // model.get_output_embeddings().out_features)  # scored nodes of a chunk
    scored = np.append(np.unique(nodes), len(trie))
    end = torch.from_numpy(trie.end).to(device)
    depth, tokens = torch.from_numpy(trie.depth).to(device), torch.from_numpy(trie.tokens).to(device)
    cache, path = DynamicCache(), end.new_empty(0)
    values, greedy = [], []
    with log.progress(range(len(trie)), "scoring", "token") as bar:
        stop = 0
        while stop < len(trie):
            start = stop
            beyond = min(np.searchsorted(scored, start) + largest, len(scored) - 1)
            stop = min(start + _chunk_length(len(path), minimum), int(scored[beyond]))
            queries = torch.arange(start, stop, device=device)
            keys = torch.cat([path, queries])
            visible = (keys <= queries[:, None]) & (queries[:, None] < end[keys])
            # Along a path, what counts as distance is the depth.
            distance = depth[queries][:, None] - depth[keys]
            masks = {r: _additive(visible & (distance < r), model.dtype) for r in set(reach.values())}
            # Models with several kinds of layers take a mask for each; every model takes one for all its layers.
            mask = {kind: masks[r] for kind, r in reach.items()} if len(masks) > 1 else masks.popitem()[1]
            within = slice(*np.searchsorted(nodes, [start, stop]))  # which of `nodes` this chunk computes
            rows, row_of_target = np.unique(nodes[within] - start, return_inverse=True)
            logits = model(
                input_ids=tokens[None, start:stop],
                position_ids=depth[None, start:stop],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.from_numpy(rows).to(device),  # no rows in a chunk of contexts
            ).logits[0]
            logits = logits.float()
            target, row = torch.from_numpy(targets[within]).to(device), torch.from_numpy(row_of_target).to(device)
            chosen = logits[row, target] - logits.logsumexp(-1)[row]
            values.append(chosen.double().cpu().numpy())
            greedy.append((logits.argmax(-1)[row] == target).cpu().numpy())
            if stop < len(trie):
                # The next chunk sees of all this only the ancestors of its first node.
                kept = (stop < end[keys]).nonzero().flatten()
                path = keys[kept]
                _keep(cache, kept)
            bar.update(stop - start)
    return np.concatenate(values), np.concatenate(greedy)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask (1, 1, queries, keys) to be added to attention scores; `visible` (queries, keys) says which keys count."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None]


def _chunk_length(path: int, minimum: int) -> int:
    """Tokens of the next chunk: twice those of the path before it, but one to four times the minimum.

    Each token of a chunk attends to the whole path. Where that is long, the hidden pairs of a longer chunk cost little.
    """
    return max(minimum, min(2 * path, 4 * minimum))


def _keep(cache, positions: Tensor) -> None:
    """Reduce the cache of every layer to these positions."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, positions], layer.values[:, :, positions]
