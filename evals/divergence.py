"""How far a model's predictions are from the full-precision model's: KL divergence and agreement per token.

KL(full precision || quantized) is that of the next-token distributions, over the whole vocabulary, at every position of the
windows. Both models compute in float32: in bfloat16, rounding alone is half of what 8-bit weights do. The rounding that
remains is the floor: how far the full-precision model is from itself when it computes other numbers of windows, of other
lengths. KL says how much the predictions changed, not whether they got worse.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evals import Result, mean_and_stderr, metric
from evals.core.reference import read_reference
from evals.core.windows import protocol
from methods.core.job.options import require_positive
from methods.core.job.registry import Evaluation
from methods.core.job.runtime import dtype_name, rows_at_a_time

EVALUATION = Evaluation("reference")
RESAMPLES = 200
# Of the noise floor: the number of windows, and the number of equal parts of which the first is computed.
SHAPES = ((1, 4), (2, 3))


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
    """`data` is a file that workflow/prepare/reference.py wrote. ValueError if it was made with other options."""
    reference, info = read_reference(data)
    if info["options"] != asdict(config):
        raise ValueError(f"{data} was made with {info['options']}, not with {asdict(config)}")
    if reference["states"].dtype != model.dtype:
        raise ValueError(
            f"{data} was computed in {reference['states'].dtype}, but this model computes in {model.dtype}"
        )
    kl, agreement = _compare(model, reference, log)
    if not np.isfinite(kl).all():
        raise ValueError(f"the divergence at {int((~np.isfinite(kl)).sum())} of {kl.size} tokens is not finite")
    mean, stderr = mean_and_stderr(kl.mean(1))
    pairing = {"column": "kl", "change": "difference"}
    metrics = {
        "kl_mean": metric(mean, stderr, higher_is_better=False, unit="nats per token", items=pairing),
        "kl_p99": metric(_p99(kl), _p99_stderr(kl), higher_is_better=False, unit="nats per token"),
        "top1_agreement": metric(*mean_and_stderr(agreement.mean(1)), higher_is_better=True, unit="share"),
        "kl_floor": metric(info["kl_floor"], higher_is_better=False, unit="nats per token"),
    }
    bos = "+bos" if info.get("bos_token_id") else ""
    dtype = dtype_name(model.dtype)
    return Result(
        protocol=protocol(f"windows of {config.window}{bos}, {dtype}", info, len(kl), info["windows"]),
        metrics=metrics,
        n=int(kl.size),
        partial=len(kl) < info["windows"],
        data=info,
        items={"window": list(range(len(kl))), "kl": kl.mean(1).tolist(), "agreement": agreement.mean(1).tolist()},
    )


def _compare(model, reference: dict[str, Tensor], log) -> tuple[np.ndarray, np.ndarray]:
    """KL in nats at each token of the reference's windows, and whether both models' first choice is the same token:
    (windows, length) each."""
    device = model.device
    head = [reference[name].to(device) for name in ("head", "bias") if name in reference]
    windows = list(zip(reference["input_ids"], reference["states"], strict=True))
    kl, agreement = [], []
    for ids, states in log.progress(windows, "divergence", "window"):
        logits = model(input_ids=ids[None].long().to(device), use_cache=False).logits[0]
        expected = F.linear(states.to(device), *head)
        kl.append(divergence(expected, logits).cpu().numpy())
        agreement.append((logits.argmax(-1) == expected.argmax(-1)).cpu().numpy())
        del logits, expected  # before the next are computed
    return np.stack(kl), np.stack(agreement)


@torch.inference_mode()
def noise_floor(model, windows: Tensor, states: Tensor) -> float:
    """Mean divergence, in nats per token, of the full-precision model from itself in other shapes: the largest over SHAPES.

    The beginnings of the first windows (windows, length) are computed again and compared with what `states` (windows,
    length, width), from `reference`, gave there. The tokens before each position are the same, so only the order of
    additions differs. (Not every shape shows it: in bfloat16 some give bit-equal logits, others are 0.0015 nats off.)
    """
    head = model.get_output_embeddings()
    floors = []
    for count, part in SHAPES:
        length = -(-windows.shape[1] // part)
        logits = model(input_ids=windows[:count, :length].to(model.device), use_cache=False).logits
        expected = F.linear(states[:count, :length].to(model.device), head.weight, head.bias)
        floors.append(float(divergence(expected.flatten(0, 1), logits.flatten(0, 1)).mean()))
    return max(floors)


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """KL in nats of the distribution of `logits` (tokens, vocabulary) from that of `expected`, per token, summed in fp64."""
    kl, rows = [], rows_at_a_time(logits)
    for p, q in zip(expected.split(rows), logits.split(rows), strict=True):
        p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(kl)


def _p99(values: np.ndarray) -> float:
    return float(np.quantile(values, 0.99))


def _p99_stderr(kl: np.ndarray) -> float | None:
    """Bootstrap standard error of the 99th percentile. Whole windows (rows) are drawn, as a window's tokens are dependent."""
    if len(kl) < 2:
        return None
    generator = np.random.default_rng(0)
    draws = generator.integers(len(kl), size=(RESAMPLES, len(kl)))
    return float(np.std([_p99(kl[rows]) for rows in draws], ddof=1))
