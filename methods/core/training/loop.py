"""The one loop of training end to end: every QAT method and control that does so goes through it, so they differ in what they
train, its rates and the shape of the schedule, and in nothing else. (Training block by block is in reconstruction.py.)

Own code and not transformers' Trainer or accelerate: the loop is thirty lines, and what matters here is what they do not
offer: a resume that gives bit-equal parameters on a CPU (a GPU may add up in another order each time), state without pickle,
and a stop with a record when the loss is not finite.

What is trained is fp32; the matrix products run in the dtype that the model was loaded in. Batches come in the order of
`tokens` and nothing in the loop is random, so a step number, the parameters and the optimizer's state are all that a
resumed run needs.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from methods.core.job import ranks
from methods.core.job.files import atomic_path, sha256_file
from methods.core.job.log import RunLog
from methods.core.job.saves import Saves
from methods.core.job.tensors import read_state, write_sealed
from methods.core.training.flops import counter
from methods.core.training.losses import Loss
from methods.core.training.sharding import divided_like, is_divided, part, whole

# Of Adam. Gradients by steps of a fine grid, and those of a block's error, lie below the usual 1e-8, which would lower the
# rates of fine grids and of large models.
EPSILON = 1e-15


def rate_at(steps: int, rate: float) -> float:
    """A learning rate for so many optimizer steps: `rate` up to 32 of them, `rate * sqrt(32 / steps)` for more.

    The default rates of all methods follow it. At 3 bits those of 8 steps were the best or level at 32 for PEQA, LR-QAT,
    DL-QAT and LLM-QAT; at 128 half of them was better for LLM-QAT, and for PEQA and LR-QAT from GPTQ, level for the control,
    and behind for PEQA from rounding. For the rest it is assumed (tests/bench/rates.py, reports/LOG.md). At 2 steps twice the
    rate is 1 to 2 % better for PEQA from Qronos and the control at 3 bits, 7 % worse for PEQA from rounding at 4: left.
    """
    return rate * min(1.0, (32 / steps) ** 0.5)


@dataclass(frozen=True)
class Schedule:
    """Shape of the learning rate, and the norm to which gradients are clipped."""

    decay: str = "cosine"  # or "linear", both to zero
    warm_up: float = 0.1  # share of the steps
    max_gradient_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW

    def __post_init__(self):
        if self.decay not in ("cosine", "linear"):
            raise ValueError(f"a rate decays by cosine or linear, not by {self.decay!r}")

    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the learning rates at `step` of `steps`."""
        warm_up = round(self.warm_up * steps)
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        done = (step - warm_up) / max(1, steps - warm_up)
        return 1 - done if self.decay == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)

    def apply(self, optimizer: torch.optim.Optimizer, rates: list[float], step: int, steps: int) -> None:
        """Give each parameter group its rate at `step` of `steps`; `rates` are those of the groups in full."""
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * self.factor(step, steps)


def train(
    model: nn.Module,
    groups: list[dict],
    tokens: Tensor,
    loss: Loss,
    schedule: Schedule,
    log: RunLog,
) -> None:
    """Train the parameters of `groups` in place, one optimizer step per batch of `tokens`.

    groups: AdamW's parameter groups ({"params", "lr"}); their parameters are fp32, all others stay as they are.
    tokens: (steps, accumulation, batch, sequence) token ids. loss: of the model and a batch (batch, sequence), a scalar.
    Several processes (ranks.py) share the sequences of each step. Writes `metrics.jsonl` and, while it runs,
    `state.safetensors` to `log.folder`; a run that finds its own state there continues from it. Records the share of trained
    values that moved. FloatingPointError if a loss is not finite.
    """
    tokens = divided(tokens)
    model.requires_grad_(False)
    parameters = [p for group in groups for p in group["params"]]
    for p in parameters:
        p.requires_grad_(True)
    before = [subsample(part(p)) for p in parameters]
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas, eps=EPSILON, weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    state = log.folder / "state.safetensors"
    told, earlier = _load_state(state, optimizer, parameters)
    first = len(told)
    if first:
        log.info(f"resuming at step {first} of {len(tokens)}")
        log.earlier_seconds = earlier
    started, saves = time.perf_counter(), Saves()
    bar = log.progress(range(first, len(tokens)), "training", "step")
    metrics = _open_metrics(log.folder / "metrics.jsonl", told)
    with metrics:
        for step in bar:
            schedule.apply(optimizer, rates, step, len(tokens))
            try:
                value, norm = _gradient(model, parameters, tokens[step], loss, schedule.max_gradient_norm)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error} at step {step} of {len(tokens)}; lower the learning rate") from None
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - started
            speed = (step + 1 - first) * tokens[0].numel() / seconds
            told.append(json.dumps({"step": step, "loss": value, "gradient_norm": norm}) + "\n")
            metrics.write(told[-1])
            bar.set_postfix(loss=f"{value:.3f}", tokens_per_second=f"{speed:.0f}", refresh=False)
            if ranks.agree(saves.due()):
                with saves.saving():
                    metrics.flush()
                    _save_state(state, optimizer, parameters, told, earlier + time.perf_counter() - started)
    changed = torch.cat([subsample(part(p)) != b for p, b in zip(parameters, before, strict=True)])
    counts = torch.stack([changed.sum(), changed.new_tensor(len(changed), dtype=torch.int64)])
    ranks.add_up([counts])
    log.trained(
        steps=len(tokens),
        tokens=tokens.numel(),
        flops=_flops(model, tokens, loss),
        parameters=sum(p.numel() for p in parameters),
        moved=(counts[0] / counts[1]).item(),
        schedule=asdict(schedule),
        learning_rates=rates,
        processes=ranks.count(),
        divided=is_divided(model),
        metrics_sha256=sha256_file(metrics.name) if ranks.leads() else None,
    )
    model.requires_grad_(False)


def divided(tokens: Tensor) -> Tensor:
    """tokens (steps, accumulation, batch, sequence) with so many passes a step that the processes can share them."""
    return tokens.flatten(1, 2).unflatten(1, (ranks.passes(tokens.shape[1], ranks.count()), -1))


def _gradient(
    model: nn.Module, parameters: list[Tensor], batches: Tensor, loss: Loss, max_norm: float
) -> tuple[float, float]:
    """Mean loss over the batches of a step, and the norm of its gradient before this was clipped to `max_norm`."""
    total = 0.0
    for batch in ranks.share(batches):
        value = loss(model, batch.to(parameters[0].device)) / len(batches)
        value.backward()
        total += value.item()
    if ranks.count() > 1:
        sums = part(parameters[0]).new_tensor([total])
        whole_here = [p.grad for p in parameters if p.grad is not None and not is_divided(p)]
        ranks.add_up([sums, *whole_here])  # gradients of what is divided are sums already
        total = sums.item()
    if not math.isfinite(total):
        raise FloatingPointError(f"the loss is {total}")
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).item()
    if not math.isfinite(norm):
        raise FloatingPointError("the gradient is not finite")
    return total, norm


def _flops(model: nn.Module, tokens: Tensor, loss: Loss) -> int:
    """Floating-point operations of all steps, counted on one sequence. It is not one of a step, since torch takes other
    kernels while it counts."""
    sequence = tokens[0, 0, :1]
    with counter() as counted:
        loss(model, sequence.to(next(model.parameters()).device)).backward()
    model.zero_grad()
    return counted.get_total_flops() * tokens.numel() // sequence.numel()


def subsample(tensor: Tensor) -> Tensor:
    """Evenly spaced values of a tensor, about 65536 of a larger one: they tell what share of all changes. The stride is odd,
    else a width that it divides would have a few of its columns seen only."""
    values = tensor.detach().flatten()
    return values[:: len(values) // 65536 | 1].clone()


def _open_metrics(path: Path, told: list[str]):
    """The metrics file, with a line for each step that is done, to be added to."""
    if not ranks.leads():
        return open(os.devnull, "w")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(told))
    return open(path, "a")


def _save_state(
    path: Path, optimizer: torch.optim.Optimizer, parameters: list[Tensor], told: list[str], seconds: float
) -> None:
    """Write how far the training is; all processes call it, and go on when the first has written."""
    tensors = {}
    for i, p in enumerate(parameters):
        for name, value in {"value": p.detach(), **optimizer.state[p]}.items():
            value = whole(value)
            if ranks.leads():
                tensors[f"{i}.{name}"] = value.cpu()
    if ranks.leads():
        write_sealed(path, tensors, {"metrics": "".join(told), "seconds": str(seconds)})
    ranks.wait()


def _load_state(path: Path, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> tuple[list[str], float]:
    """A line of metrics for each step that is done, and the seconds that they took; none if there is no state."""
    loaded = read_state(path)
    if loaded is None:
        return [], 0.0
    tensors, facts = loaded
    for i, p in enumerate(parameters):
        with torch.no_grad():
            p.copy_(divided_like(tensors[f"{i}.value"], p))
        moments = {name: divided_like(tensors[f"{i}.{name}"].clone(), p) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": tensors[f"{i}.step"].to(p.device, copy=True), **moments}
    return facts["metrics"].splitlines(keepends=True), float(facts["seconds"])
