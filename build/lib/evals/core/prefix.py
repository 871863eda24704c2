"""Log-likelihoods of many continuations, every shared prefix computed once.

The choices of a question share its text, the questions of a few-shot subject share the examples: most of what a benchmark
feeds a model it has fed it before. Here the sequences become a trie (a node is a token together with all tokens before
it), whose nodes are computed in depth-first order, a chunk at a time. All that a chunk needs from before are the keys and
values on the path from the root to its first node, so the cache is one path, nothing is padded and nothing is computed
twice. Within a chunk a token sees its ancestors only, by the attention mask.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Least tokens per forward pass. A token's attention covers its whole chunk, most of which the mask hides, so on a CPU longer
# chunks cost more than they save, unless the path before them is long (then up to four times as many); a GPU needs them.
CHUNK = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Trie:
    """Distinct prefixes of some sequences in depth-first order: (nodes,) each.

    A node is an ancestor of node `i`, or `i` itself, if it is not after `i` and its `end`, one past its last descendant,
    is.
    """

    tokens: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    tails: list[np.ndarray]  # of each sequence, the nodes of its last tokens, as many as asked for

    @classmethod
    def of(cls, sequences: list[list[int]], counts: list[int]) -> Trie:
        """The trie of the sequences, with the nodes of the last `counts[i]` tokens of each."""
        tokens, depths, nodes = [], [], 0
        end = np.empty(sum(map(len, sequences)), np.int64)
        path = np.empty(max(map(len, sequences)), np.int64)
        found: list[np.ndarray] = [path] * len(sequences)
        before = np.empty(0, np.int64)
        # Sorted, each sequence shares its longest common prefix with the one before it.
        for index in sorted(range(len(sequences)), key=sequences.__getitem__):
            sequence = np.asarray(sequences[index], np.int64)
            shared = _common_prefix(before, sequence)
            end[path[shared : len(before)]] = nodes
            new = len(sequence) - shared
            path[shared : len(sequence)] = np.arange(nodes, nodes + new)
            tokens.append(sequence[shared:])
            depths.append(np.arange(shared, len(sequence)))
            nodes += new
            found[index] = path[len(sequence) - counts[index] : len(sequence)].copy()
            before = sequence
        end[path[: len(before)]] = nodes
        return cls(np.concatenate(tokens), np.concatenate(depths), end[:nodes], found)

    def __len__(self) -> int:
        return len(self.tokens)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if len(different) else shorter


def check_supported(model, longest: int) -> None:
    """ValueError if the model's attention cannot be given a mask over a trie of sequences up to `longest` tokens."""
    config = model.config.get_text_config()
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} takes no position_ids, which scoring with shared prefixes needs")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{name} has layers of {', '.join(sorted(others))}; scoring with shared prefixes needs attention"
        )
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and longest > window:
        raise ValueError(f"{name} attends to {window} tokens, but a sequence has {longest}")


@torch.inference_mode()
def log_likelihoods(model, requests: list[tuple[list[int], list[int]]], log) -> list[tuple[float, bool]]:
    """Of each request (context tokens, continuation tokens), the log-likelihood of the continuation in nats, and whether
    every one of its tokens is the model's first choice.

    Logits are computed for the tokens of continuations only, their log-softmax in fp32. ValueError for an empty context or
    continuation, for a model that cannot be given such a mask, and for log-likelihoods that are not finite.
    """
    if not requests:
        return []
    for context, continuation in requests:
        if not context or not continuation:
            raise ValueError("a request has an empty context or continuation")
    trie = Trie.of([c + k[:-1] for c, k in requests], [len(k) for _, k in requests])
    check_supported(model, int(trie.depth.max()) + 1)
    scored = np.concatenate(trie.tails)
    targets = np.concatenate([k for _, k in requests])
    order = np.argsort(scored, kind="stable")
    values, firsts = _score_nodes(model, trie, scored[order], targets[order], log)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} log-likelihoods are not finite")
    back = np.argsort(order, kind="stable")
    stops = np.cumsum([len(k) for _, k in requests])[:-1]
    pairs = zip(np.split(values[back], stops), np.split(firsts[back], stops), strict=True)
    return [(float(v.sum()), bool(f.all())) for v, f in pairs]


def _score_nodes(model, trie: Trie, nodes: np.ndarray, targets: np.ndarray, log) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability of target `i` after node `nodes[i]` (sorted), fp64, and whether it is the most likely: (targets,)."""
    from transformers import DynamicCache

    where = model.device
    chunk = CHUNK.get(where.type, CHUNK["cpu"])
    end = torch.from_numpy(trie.end).to(where)
    depth, tokens = torch.from_numpy(trie.depth).to(where), torch.from_numpy(trie.tokens).to(where)
    cache, path = DynamicCache(), end.new_empty(0)
    values, firsts = [], []
    with log.progress(range(len(trie)), "scoring", "token") as bar:
        stop = 0
        while stop < len(trie):
            start = stop
            stop = min(start + max(chunk, min(2 * len(path), 4 * chunk)), len(trie))
            queries = torch.arange(start, stop, device=where)
            keys = torch.cat([path, queries])
            visible = (keys <= queries[:, None]) & (queries[:, None] < end[keys])
            mask = torch.zeros(visible.shape, dtype=model.dtype, device=where)
            mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
            pairs = slice(*np.searchsorted(nodes, [start, stop]))
            rows, inverse = np.unique(nodes[pairs] - start, return_inverse=True)
            logits = model(
                input_ids=tokens[None, start:stop],
                position_ids=depth[None, start:stop],
                attention_mask=mask[None, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.from_numpy(rows if len(rows) else np.zeros(1, np.int64)).to(where),
            ).logits[0]
            if len(rows):
                target = torch.from_numpy(targets[pairs]).to(where)
                row = torch.from_numpy(inverse).to(where)
                logits = logits.float()
                chosen = logits[row, target] - logits.logsumexp(-1)[row]
                values.append(chosen.double().cpu().numpy())
                firsts.append((logits.argmax(-1)[row] == target).cpu().numpy())
            if stop < len(trie):
                # What the next chunk sees of this one: the ancestors of its first node.
                kept = ((keys < stop) & (stop < end[keys])).nonzero().flatten()
                path = keys[kept]
                _keep(cache, kept)
            bar.update(stop - start)
    return np.concatenate(values), np.concatenate(firsts)


def _keep(cache, positions: Tensor) -> None:
    """Reduce the cache of every layer to these positions."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, positions], layer.values[:, :, positions]
