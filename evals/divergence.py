"""How far a model's predictions are from the full-precision model's: KL divergence and agreement per token.

KL(full precision || quantized) of the next-token distributions at every position of the windows, over the whole vocabulary.
Both are computed in float32: in bfloat16, rounding alone is half of what 8-bit weights do. What is left of it is the floor:
how far the full-precision model is from itself when it computes other numbers of windows, of other lengths.
The full-precision side is computed once per model and kept as the states that its head reads, which give its logits again
exactly and are a hundredth of their size. (Its 256 most likely tokens and the rest as one would be smaller still, but 6 to
8 % off on SmolLM2-135M; reports/LOG.md.) KL says how much changed, not whether it got worse.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from evals import Result, metric
from methods.core.job.files import atomic_path
from methods.core.job.options import require_positive
from methods.core.job.registry import Evaluation
from methods.core.statistics import mean_and_stderr

EVALUATION = Evaluation("reference")
RESAMPLES = 200
SHAPES = ((1, 4), (2, 3))  # the noise floor's: so many windows, the first of so many parts of each
ROWS = 64  # tokens at a time: fp64 over a whole vocabulary is large


@dataclass(frozen=True)
class Config:
    window: int = 2048  # tokens per window; no larger than the model's context
    max_windows: int | None = None  # only the first ones; the result is then marked as partial
    # "compute" is the dtype that the machine computes the model in, for models that are too large for float32.
    dtype: Literal["float32", "compute"] = "float32"

    def __post_init__(self):
        require_positive(self, "max_windows")
        if self.window < 2:
            raise ValueError(f"window is {self.window}; it needs two tokens, as a part of it is computed by itself")


@torch.inference_mode()
def evaluate(model, checkpoint, config, data, log) -> Result:
    """`data` is a file of `reference`. ValueError if it was made with other options."""
    reference, info = read_reference(data)
    if info["options"] != asdict(config):
        raise ValueError(f"{data} was made with {info['options']}, not with {asdict(config)}")
    if reference["states"].dtype != model.dtype:
        raise ValueError(
            f"{data} was computed in {reference['states'].dtype}, but this model computes in {model.dtype}"
        )
    where = model.device
    head = [reference[name].to(where) for name in ("head", "bias") if name in reference]
    kl, agreement = [], []
    for ids, states in log.progress(
        list(zip(reference["input_ids"], reference["states"], strict=True)), "divergence", "window"
    ):
        logits = model(input_ids=ids[None].long().to(where), use_cache=False).logits[0]
        expected = F.linear(states.to(where), *head)
        kl.append(divergence(expected, logits).cpu().numpy())
        agreement.append((logits.argmax(-1) == expected.argmax(-1)).cpu().numpy())
    kl, agreement = np.stack(kl), np.stack(agreement)
    if not np.isfinite(kl).all():
        raise ValueError(f"the divergence at {int((~np.isfinite(kl)).sum())} of {kl.size} tokens is not finite")
    metrics = {
        "kl_mean": metric(*mean_and_stderr(kl.mean(1)), higher_is_better=False, unit="nats per token"),
        "kl_p99": metric(_p99(kl), _p99_stderr(kl), higher_is_better=False, unit="nats per token"),
        "top1_agreement": metric(*mean_and_stderr(agreement.mean(1)), higher_is_better=True, unit="share"),
        "kl_floor": metric(info["kl_floor"], higher_is_better=False, unit="nats per token"),
    }
    partial = info["windows"] > len(kl)
    bos = "+bos" if info.get("bos_token_id") else ""
    dtype = str(model.dtype).removeprefix("torch.")
    protocol = f"windows of {config.window}{bos}, {dtype}/{info['dataset']}@{info['text_sha256'][:8]}"
    if partial:
        protocol += f"/first-{len(kl)}-of-{info['windows']}"
    items = {"window": list(range(len(kl))), "kl": kl.mean(1).tolist(), "agreement": agreement.mean(1).tolist()}
    return Result(protocol, metrics, int(kl.size), partial, info, items)


@torch.inference_mode()
def reference(model, windows: Tensor, log) -> dict[str, Tensor]:
    """What gives the full-precision model's logits at each token of windows (windows, length) int64.

    `states` (windows, length, width), what the head reads; `head` (vocabulary, width), its weight; `bias` if it has one.
    ValueError if the logits are not the head's output alone, as in models that cap or scale them.
    """
    head = model.get_output_embeddings()
    kept = []
    for ids in log.progress(windows, "reference", "window"):
        states, logits = _read_by_head(model, head, ids.to(model.device))
        if not kept and not torch.equal(F.linear(states, head.weight, head.bias), logits):
            raise ValueError(
                f"{type(model).__name__} changes the logits after its head; divergence keeps what the head reads"
            )
        kept.append(states.cpu())
    found = {"states": torch.stack(kept), "head": head.weight.detach().cpu()}
    return found if head.bias is None else found | {"bias": head.bias.detach().cpu()}


@torch.inference_mode()
def noise_floor(model, windows: Tensor, states: Tensor) -> float:
    """Mean divergence, in nats per token, of the full-precision model from itself in other shapes: the largest of some.

    The beginnings of the first windows (windows, length) are computed again, and compared with what `states` (windows,
    length, width), from `reference`, gave there: the tokens before each position are the same, so that only the order of
    additions differs. (Not in every shape: bfloat16 gives bit-equal logits in some and is 0.0015 nats off in others.)
    """
    head = model.get_output_embeddings()
    floors = []
    for count, part in SHAPES:
        length = -(-windows.shape[1] // part)
        logits = model(input_ids=windows[:count, :length].to(model.device), use_cache=False).logits
        expected = F.linear(states[:count, :length].to(model.device), head.weight, head.bias)
        floors.append(float(divergence(expected.flatten(0, 1), logits.flatten(0, 1)).mean()))
    return max(floors)


def _read_by_head(model, head, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The states (tokens, width) that `head` is given for one window (tokens,), and the model's logits."""
    states = []
    handle = head.register_forward_pre_hook(lambda module, args: states.append(args[0][0]))
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        return states[0], logits
    finally:
        handle.remove()


def write_reference(path: str | Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Keep a reference with the windows it is of (`input_ids`), and what is known about them."""
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"info": json.dumps(info)})


def read_reference(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """What `write_reference` wrote."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["info"])


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL in nats of the distribution of `logits` (tokens, vocabulary) from that of `expected`, per token, summed in fp64."""
    kl = []
    for p, q in zip(expected.split(ROWS), logits.split(ROWS), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kl)


def _p99(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99))


def _p99_stderr(kl: np.ndarray) -> float | None:
    """Bootstrap standard error of the 99th percentile; whole windows (rows) are drawn, as the tokens of one depend."""
    if len(kl) < 2:
        return None
    generator = np.random.default_rng(0)
    draws = generator.integers(len(kl), size=(RESAMPLES, len(kl)))
    return float(np.std([_p99(kl[rows]) for rows in draws], ddof=1))
