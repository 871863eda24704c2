"""Perplexity by the GPTQ protocol: disjoint windows, mean over each window's shifted tokens, mean over windows, exp.

The text's records are joined and tokenized once, cut into windows of `window` tokens, the tail dropped; logits in fp32,
sums in fp64. With a window of 2048 and WikiText-2 this is the number of the papers' tables (`gptq-2048`); LR-QAT's is
`gptq-1024`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from evals import Result, metric
from methods.core.options import require_positive
from methods.core.tokens import check_length, read_windows

DATA = "tokens"


@dataclass(frozen=True)
class Config:
    window: int = 2048  # tokens per window; no larger than the model's context
    batch_size: int = 4  # windows per forward pass
    max_windows: int | None = None  # only the first ones; the result is then marked as partial

    def __post_init__(self):
        require_positive(self, "batch_size", "max_windows")
        if self.window < 2:
            raise ValueError(f"window is {self.window}; it needs two tokens, one to predict the other from")


def evaluate(model, config, data, log) -> Result:
    """`data` is a token file. ValueError if the window is longer than the model's context."""
    check_length(model, config.window, "window")
    windows, info = read_windows(data, config.window)
    total = len(windows)
    windows = windows[: config.max_windows]
    nll = window_nll(model, windows, config.batch_size, log)
    if not nll.isfinite().all():
        raise ValueError(f"the loss of {int((~nll.isfinite()).sum())} of {len(nll)} windows is not finite")

    partial = len(windows) < total
    protocol = f"gptq-{config.window}/{info['dataset']}@{info['text_sha256'][:8]}"
    if partial:
        protocol += f"/first-{len(windows)}-of-{total}"
    perplexity = nll.mean().exp()
    # Delta method on the mean over windows; a paired difference between two cells is far more certain than this.
    stderr = perplexity * nll.std() / len(nll) ** 0.5 if len(nll) > 1 else None
    metrics = {"perplexity": metric(perplexity, stderr, higher_is_better=False, unit="perplexity")}
    items = {"window": list(range(len(nll))), "nll": nll.tolist()}
    return Result(protocol, metrics, len(windows), partial, info, items)


def window_nll(model, windows: Tensor, batch_size: int, log) -> Tensor:
    """Mean negative log-likelihood, in nats and fp64, of the shifted tokens of each window: (windows,)."""
    where = model.device
    means = []
    with torch.inference_mode():
        for batch in log.progress(windows.split(batch_size), "perplexity", "batch"):
            batch = batch.to(where)
            logits = model(input_ids=batch, use_cache=False).logits
            # One window at a time: fp32 logits of a whole batch would be the largest tensor of the run.
            for row, ids in zip(logits, batch, strict=True):
                means.append(F.cross_entropy(row[:-1].float(), ids[1:], reduction="none").double().mean())
    return torch.stack(means).cpu()
