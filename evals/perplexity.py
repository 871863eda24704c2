"""Perplexity by the GPTQ protocol: disjoint windows, mean over each window's shifted tokens, mean over windows, exp.

The text's records are joined, tokenized once and cut into windows of `window` tokens; the tail is dropped. Logits are
made fp32, sums are in fp64. With a window of 2048 on WikiText-2 this is the number of the papers' tables (`gptq-2048`);
LR-QAT's is `gptq-1024`.

The papers have no BOS token inside the stream, not even for models that were trained with one at the start of every sequence.
Such a model is far worse then, and what training gains is mostly that it learns to do without. So by default every window
begins with BOS where the tokenizer adds one, which is another protocol (`gptq-2048+bos`); `bos: papers` is theirs, with BOS
before the whole text (`gptq-2048+bos-once`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from evals import Result, metric
from evals.core.windows import protocol
from methods.core.job.options import require_positive
from methods.core.job.registry import Evaluation
from methods.core.job.runtime import rows_at_a_time
from methods.core.model.layers import quantized_layers
from methods.core.tokens import check_length, read_windows

EVALUATION = Evaluation("tokens")
# A full-precision model needs a BOS token if that lowers its perplexity on the first windows by more than this share.
GAIN_BY_BOS, WINDOWS_WITH_BOS = 0.05, 4


@dataclass(frozen=True)
class Config:
    window: int = 2048  # tokens per window, BOS included; no larger than the model's context
    batch_size: int = 4  # windows per forward pass
    max_windows: int | None = None  # only the first ones; the result is then marked as partial
    bos: Literal["model", "papers"] = "model"  # in every window where the model has one; or once, before the whole text

    def __post_init__(self):
        require_positive(self, "batch_size", "max_windows")
        if self.window < 2:
            raise ValueError(f"window is {self.window}; it needs two tokens, one to predict the other from")


def evaluate(model, checkpoint, config, data, log) -> Result:
    """`data` is a token file. ValueError if the window is longer than the model's context, or lacks a BOS token it needs."""
    check_length(model, config.window, "window")
    windows, info = read_windows(data, config.window, "each" if config.bos == "model" else "first")
    total = len(windows)
    windows = windows[: config.max_windows]
    losses = token_nll(model, windows, config.batch_size, log)
    nll = losses.mean(1)
    if not nll.isfinite().all():
        raise ValueError(f"the loss of {int((~nll.isfinite()).sum())} of {len(nll)} windows is not finite")

    guess = math.log(model.config.get_text_config().vocab_size)  # nats
    if broken := int((nll > guess).sum()):
        log.departure(
            f"perplexity on {info['dataset']}: {broken} of {len(nll)} windows are predicted worse than by a guess among all "
            "tokens; the model breaks there, and where they are few the mean is theirs"
        )
    added = bool(info.get("bos_token_id"))
    if config.bos == "model" and not added and info.get("tokenizer_bos_token_id"):
        check_bos(model, windows, losses, int(info["tokenizer_bos_token_id"]), config.batch_size, log)
    perplexity = nll.mean().exp()
    # Delta method on the mean over windows; a paired difference between two cells is far more certain than this.
    stderr = perplexity * nll.std() / len(nll) ** 0.5 if len(nll) > 1 else None
    bos = {"model": "+bos", "papers": "+bos-once"}[config.bos] if added else ""
    pairing = {"column": "nll", "change": "relative"}
    return Result(
        protocol=protocol(f"gptq-{config.window}{bos}", info, len(windows), total),
        metrics={"perplexity": metric(perplexity, stderr, higher_is_better=False, unit="perplexity", items=pairing)},
        n=len(windows),
        partial=len(windows) < total,
        data=info,
        items={"window": list(range(len(nll))), "nll": nll.tolist()},
    )


def token_nll(model, windows: Tensor, batch_size: int, log) -> Tensor:
    """Negative log-likelihood, in nats and fp64, of each window's tokens after the first: (windows, length - 1)."""
    # Here before any logits are: a result between those of two batches would keep them from taking the same place in memory.
    losses = torch.empty(len(windows), windows.shape[1] - 1, dtype=torch.float64, device=model.device)
    batches = list(zip(windows.to(model.device).split(batch_size), losses.split(batch_size), strict=True))
    with torch.inference_mode():
        for batch, out in log.progress(batches, "perplexity", "batch"):
            _put_losses(model(input_ids=batch, use_cache=False).logits, batch, out)
    return losses.cpu()


def _put_losses(logits: Tensor, batch: Tensor, out: Tensor) -> None:
    """Into `out`, of each window of a batch. In a function, so that no logits are left while the next are computed, and a few
    tokens at a time, since those of a batch in fp32 would be the largest tensor of the run."""
    rows = rows_at_a_time(logits)
    for window, ids, losses in zip(logits, batch, out, strict=True):
        for p, i, loss in zip(window[:-1].split(rows), ids[1:].split(rows), losses.split(rows), strict=True):
            loss.copy_(F.cross_entropy(p.float(), i, reduction="none"))


def check_bos(model, windows: Tensor, losses: Tensor, bos: int, batch_size: int, log) -> None:
    """ValueError if a full-precision model is much better with its tokenizer's BOS token before the windows.

    windows: (windows, length) without it. losses: their `token_nll`. The comparison is of the tokens that are predicted from
    other tokens of the text both ways: all but the first, and all but the last, since BOS takes a place in the window.
    """
    if quantized_layers(model) or windows.shape[1] < 3:
        return
    windows, losses = windows[:WINDOWS_WITH_BOS], losses[:WINDOWS_WITH_BOS]
    with_bos = token_nll(model, F.pad(windows[:, :-1], (1, 0), value=bos), batch_size, log)
    before, after = (float(nll.mean().exp()) for nll in (losses[:, :-1], with_bos[:, 1:]))
    log.info(f"perplexity of the first {len(windows)} windows: {before:.4g}, and {after:.4g} after a BOS token")
    if after < (1 - GAIN_BY_BOS) * before:
        raise ValueError(
            f"the model needs a BOS token that its tokenizer does not add: the perplexity of {len(windows)} windows is "
            f"{before:.4g} without and {after:.4g} with it. Set models.<name>.bos: true, which puts it before every window "
            "of calibration, training and evaluation; or, for the papers' protocol, the option bos: papers"
        )
