"""Tokens per second of prefill and decode, and energy per token, of a checkpoint on this machine's low-bit kernels.

The layers that are timed multiply with packed integers (evals/core/kernels.py), not with dequantized weights. The same model
with bf16 and with fp32 weights is timed in the same process, turn by turn. Before anything is timed, the packed model's
logits are compared with those of the dequantized checkpoint in fp32: their relative error may be at most twice that of the
bf16 model, plus 0.01. A scheme without a kernel on this machine gets the numbers of the dense models only, and the reason.

Decoding reads every weight once per step, so memory bandwidth bounds it: `decode_bandwidth_share` is the share of that bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from evals import Result, metric
from evals.core import energy
from evals.core.kernels import NoKernel, pack
from methods.core.job.log import synchronize
from methods.core.job.options import require_positive
from methods.core.job.registry import Evaluation
from methods.core.job.runtime import processor
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model
from methods.core.model.experts import is_expert
from methods.core.model.layers import QuantizedLinear, are_large, quantized_layers
from methods.core.tokens import check_length

EVALUATION = Evaluation(machine_dependent=True)
DENSE = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Config:
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    prompt: int = 64  # tokens of the prefill
    new_tokens: int = 16  # tokens that are decoded after the prompt, one at a time
    repeats: int = 5  # rounds of each measurement, of which the median is reported

    def __post_init__(self):
        require_positive(self, "prompt", "new_tokens", "repeats")
        if list(self.batch_sizes) != sorted({max(1, batch) for batch in self.batch_sizes}):
            raise ValueError(f"batch_sizes are {list(self.batch_sizes)}; they must be positive and ascending")


@torch.inference_mode()
def evaluate(model, checkpoint, config, data, log) -> Result:
    """ValueError if the packed model's logits are not the checkpoint's, if the sequence is too long for the model, or if the
    model is so large that its layers stay packed: it is compared with itself in 16 and 32 bits."""
    if are_large(quantized_layers(model).values()):
        raise ValueError("throughput has the model in 16 and 32 bits, too, and this one is too large for that")
    device = model.device
    check_length(model, config.prompt + config.new_tokens, "prompt and new_tokens")
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (max(config.batch_sizes), config.prompt), generator=random).to(device)
    if any(map(is_expert, block_linears(model))):
        raise ValueError("speeds of mixtures are not measured: their experts are called one by one here")
    models = {name: _weights_only(load_model(checkpoint, dtype).to(device)) for name, dtype in DENSE.items()}
    kernel, reason, metrics = None, None, {}
    if quantized_layers(model):
        try:
            kernel = _pack_into(models, model, checkpoint)
            metrics["logit_error"] = metric(_checked_error(models, ids[:1]), higher_is_better=False, unit="relative")
        except NoKernel as error:
            reason = str(error)
            log.departure(f"no low-bit kernel on this machine, so no throughput: {reason}")

    rows = _time(models, ids, config, log)
    bandwidth = read_bandwidth(device)
    # Names without a suffix are of the model as it would be used: packed, or in 16 bits if it is not quantized.
    plain = "packed" if kernel else None if reason else "bfloat16"
    for name, timed in models.items():
        metrics |= _metrics(rows, name, timed, config, bandwidth, "" if name == plain else f"/{name}")
    about = {"kernel": kernel, "no_kernel": reason, "bandwidth": bandwidth, "energy": energy.SOURCE}
    protocol = f"prompt{config.prompt}-new{config.new_tokens}/{torch.get_num_threads()}-threads/{processor()}"
    items = {column: [row[column] for row in rows] for column in rows[0]}
    return Result(protocol, metrics, len(rows), partial=False, data=about, items=items)


def _pack_into(models: dict[str, nn.Module], model: nn.Module, checkpoint: Path) -> str:
    """Add the packed model to the others and return the names of its kernels. NoKernel if a layer has none."""
    if any(getattr(m, kind, None) for m in model.modules() for kind in ("input_tokens", "output_tokens")):
        raise NoKernel("it quantizes activations or KV cache, and the kernels quantize weights only")
    packed = load_model(checkpoint, torch.bfloat16).to(model.device)
    kernel = pack(packed)
    models["packed"] = packed
    return kernel


def _weights_only(model: nn.Module) -> nn.Module:
    """The model with dense layers that do not quantize their tokens, and without the codes that such layers do not read."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.input_tokens = layer.output_tokens = None
            layer.packed = layer.scale = layer.zero_point = None
    return model


def _checked_error(models: dict[str, nn.Module], ids: Tensor) -> float:
    """Relative error of the packed model's logits, the larger of a prefill's and of the step's after it. ValueError if it is
    more than rounding explains."""

    def logits(model: nn.Module) -> list[Tensor]:
        out = model(input_ids=ids[:, :-1], use_cache=True)
        step = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, use_cache=True)
        return [out.logits.float(), step.logits.float()]

    exact = logits(models["float32"])
    errors = {
        name: max(float((a - b).norm() / b.norm()) for a, b in zip(logits(models[name]), exact, strict=True))
        for name in ("bfloat16", "packed")
    }
    if not errors["packed"] <= (bound := 2 * errors["bfloat16"] + 0.01):
        raise ValueError(
            f"the packed model's logits are off by {errors['packed']:.3g} (bf16: {errors['bfloat16']:.3g}, allowed: "
            f"{bound:.3g}): its kernels do not compute the checkpoint's product, so nothing was timed"
        )
    return errors["packed"]


def _time(models: dict[str, nn.Module], ids: Tensor, config: Config, log) -> list[dict]:
    """A row for each phase of every repeat, model and batch size: its seconds, tokens and joules (None without a counter).

    The models take turns, so that a machine that slows down slows all of them. The first round is not counted.
    """
    rows = []
    rounds = [(repeat, batch) for batch in config.batch_sizes for repeat in range(-1, config.repeats)]
    for repeat, batch in log.progress(rounds, "throughput", "round"):
        for name, model in models.items():
            steps = config.new_tokens if repeat >= 0 else 1
            for row in _generate(model, ids[:batch], steps):
                if repeat >= 0:
                    rows.append({"weights": name, "batch": batch, "repeat": repeat} | row)
    return rows


def _generate(model: nn.Module, ids: Tensor, steps: int) -> list[dict]:
    """Time a prefill and `steps` greedy steps after it."""
    state = {}

    def forward(tokens: Tensor) -> None:
        out = model(input_ids=tokens, past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1)
        state["cache"], state["next"] = out.past_key_values, out.logits[:, -1:].argmax(-1)

    def decode() -> None:
        for _ in range(steps):
            forward(state["next"])

    rows = []
    for phase, run, tokens in (("prefill", lambda: forward(ids), ids.numel()), ("decode", decode, len(ids) * steps)):
        with energy.measured() as joules:
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds = time.perf_counter() - start
        rows.append({"phase": phase, "seconds": seconds, "tokens": tokens, "joules": joules()})
    return rows


def _metrics(rows: list[dict], name: str, model: nn.Module, config: Config, bandwidth: float, suffix: str) -> dict:
    """The metrics of the model whose rows are called `name`; `suffix` is put after the names of its metrics."""
    metrics = {}
    for batch in config.batch_sizes:
        full = suffix + ("" if batch == config.batch_sizes[0] else f"/batch{batch}")
        for phase in ("prefill", "decode"):
            speeds = [row["tokens"] / row["seconds"] for row in _select(rows, name, phase, batch)]
            speed = metric(median(speeds), higher_is_better=True, unit="tokens/s")
            metrics[f"{phase}_tokens_per_second{full}"] = speed
        metrics |= _energy(rows, name, model, batch, full)
    size = _bytes_read(model)
    seconds = [row["seconds"] for row in _select(rows, name, "decode", config.batch_sizes[0])]
    share = size / (min(seconds) / config.new_tokens) / bandwidth
    metrics[f"weights_mb{suffix}"] = metric(size / 1e6, higher_is_better=False, unit="MB")
    metrics[f"decode_bandwidth_share{suffix}"] = metric(share, higher_is_better=True, unit="share")
    return metrics


def _select(rows: list[dict], name: str, phase: str, batch: int) -> list[dict]:
    return [row for row in rows if (row["weights"], row["phase"], row["batch"]) == (name, phase, batch)]


def _energy(rows: list[dict], name: str, model: nn.Module, batch: int, suffix: str) -> dict:
    """Joules per decoded token: `decode_joules_per_token` if they were measured, else `decode_joules_per_token_estimate`."""
    decoded = _select(rows, name, "decode", batch)
    if joules := sum(row["joules"] or 0 for row in decoded):
        value = joules / sum(row["tokens"] for row in decoded)
        return {f"decode_joules_per_token{suffix}": metric(value, higher_is_better=False, unit="J")}
    macs = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    value = energy.estimated(_bytes_read(model) / batch, macs, DENSE.get(name, torch.bfloat16).itemsize)
    return {f"decode_joules_per_token_estimate{suffix}": metric(value, higher_is_better=False, unit="J")}


def _bytes_read(model: nn.Module) -> int:
    """Bytes of the weights that every decoding step reads: all but the embedding, of which a step reads only some rows."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding.data_ptr() != head.data_ptr():
        tensors.pop(embedding.data_ptr())
    return sum(t.numel() * t.element_size() for t in tensors.values())


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second at which the processor reads memory: the best of eight sums over 256 MB, larger than most caches."""
    values, best = torch.ones(2**26, device=device), 0.0
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        values.sum()
        synchronize()
        best = max(best, values.numel() * values.element_size() / (time.perf_counter() - start))
    return best
