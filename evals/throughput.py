"""Tokens per second of prefill and decode, and energy per token, of a checkpoint on this machine's low-bit kernels.

The layers that are timed multiply with packed integers (evals/core/kernels.py), not with dequantized weights. The same model
with bf16 and with fp32 weights is timed in the same process, turn by turn, and so is llama.cpp, where it is installed, with
the checkpoint's GGUF export: what many deploy (evals/core/engines.py). Before anything is timed, logits are compared with
those of the dequantized checkpoint in fp32: their relative error may be at most twice that of the bf16 model, plus 0.01; for
llama.cpp, which rounds activations to 8 bits, twice that of the fp32 model with activations rounded so. A scheme without a
kernel on this machine gets the numbers of the dense models only, and the reason.

Decoding reads every weight once per step, so memory bandwidth bounds it: `decode_bandwidth_share` is the share of that bound.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from evals import Result, metric
from evals.core import energy
from evals.core.engines import LlamaCpp, Torch, export_for_llama_cpp
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
from methods.export import gguf

EVALUATION = Evaluation(machine_dependent=True)
DENSE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LLAMA_CPP = "llama.cpp"


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
    """ValueError if an engine's logits are not the checkpoint's, if the sequence is too long for the model, or if the
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
    engines = {
        name: Torch(_weights_only(load_model(checkpoint, dtype).to(device)), dtype) for name, dtype in DENSE.items()
    }
    exact = engines["float32"].logits(ids[:1])
    allowed = 2 * _error(engines["bfloat16"].logits(ids[:1]), exact) + 0.01
    kernel, reason, metrics = None, None, {}
    if quantized_layers(model):
        try:
            engines["packed"], kernel = _packed(model, checkpoint)
            error = _checked_error("the packed model", engines["packed"].logits(ids[:1]), exact, allowed)
            metrics["logit_error"] = metric(error, higher_is_better=False, unit="relative")
        except NoKernel as missing:
            reason = str(missing)
            log.departure(f"no low-bit kernel on this machine, so no throughput: {reason}")

    with ExitStack() as stack:
        try:
            engines[LLAMA_CPP] = stack.enter_context(_llama_cpp(model, checkpoint, config))
        except NoKernel as missing:
            log.info(f"llama.cpp is not timed: {missing}")
        else:
            allowed = max(allowed, 2 * _error(_with_rounded_activations(engines["float32"], ids[:1]), exact) + 0.01)
            error = _checked_error("llama.cpp", engines[LLAMA_CPP].logits(ids[:1]), exact, allowed)
            metrics[f"logit_error/{LLAMA_CPP}"] = metric(error, higher_is_better=False, unit="relative")
        rows = _time(engines, ids, config, log)
    bandwidth = read_bandwidth(device)
    # Names without a suffix are of the model as it would be used: packed, or in 16 bits if it is not quantized.
    plain = "packed" if kernel else None if reason else "bfloat16"
    products = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    for name, engine in engines.items():
        metrics |= _metrics(rows, name, engine, config, bandwidth, products, "" if name == plain else f"/{name}")
    about = {"kernel": kernel, "no_kernel": reason, "bandwidth": bandwidth, "energy": energy.SOURCE}
    protocol = f"prompt{config.prompt}-new{config.new_tokens}/{torch.get_num_threads()}-threads/{processor()}"
    items = {column: [row[column] for row in rows] for column in rows[0]}
    return Result(protocol, metrics, len(rows), partial=False, data=about, items=items)


def _packed(model: nn.Module, checkpoint: Path) -> tuple[Torch, str]:
    """The packed model and the names of its kernels. NoKernel if a layer has none."""
    if any(getattr(m, kind, None) for m in model.modules() for kind in ("input_tokens", "output_tokens")):
        raise NoKernel("it quantizes activations or KV cache, and the kernels quantize weights only")
    packed = load_model(checkpoint, torch.bfloat16).to(model.device)
    kernel = pack(packed)
    return Torch(packed, torch.bfloat16), kernel


@contextmanager
def _llama_cpp(model: nn.Module, checkpoint: Path, config: Config) -> Iterator[LlamaCpp]:
    """llama.cpp on the checkpoint, on the processor. NoKernel if it is not installed, or has no such weights."""
    if model.device.type != "cpu":
        raise NoKernel(f"it is timed on processors only, and this is on {model.device.type}")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with tempfile.TemporaryDirectory() as folder:
        file = export_for_llama_cpp(checkpoint, Path(folder))
        length = config.prompt + config.new_tokens
        with closing(LlamaCpp(file, tied, max(config.batch_sizes), length, torch.get_num_threads())) as engine:
            yield engine


def _weights_only(model: nn.Module) -> nn.Module:
    """The model with dense layers that do not quantize their tokens, and without the codes that such layers do not read."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.input_tokens = layer.output_tokens = None
            layer.packed = layer.scale = layer.zero_point = None
    return model


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Relative error of logits, the larger of a prefill's and of the step's after it."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


def _checked_error(name: str, found: list[Tensor], exact: list[Tensor], allowed: float) -> float:
    """`_error`. ValueError if it is more than rounding explains."""
    error = _error(found, exact)
    if not error <= allowed:
        raise ValueError(
            f"{name}'s logits are off by {error:.3g} (allowed: {allowed:.3g}): it does not compute the checkpoint's product, "
            "so nothing was timed"
        )
    return error


def _with_rounded_activations(engine: Torch, ids: Tensor) -> list[Tensor]:
    """Logits of a model whose linear layers read 8-bit integers, with a scale for every 32 in a row, as in llama.cpp."""

    def rounded(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        blocks = inputs[0].unflatten(-1, (-1, gguf.BLOCK))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(blocks.dtype).tiny)
        return ((blocks / scale).round() * scale).flatten(-2), *inputs[1:]

    handles = [layer.register_forward_pre_hook(rounded) for layer in block_linears(engine.model).values()]
    logits = engine.logits(ids)
    for handle in handles:
        handle.remove()
    return logits


def _time(engines: dict[str, Torch | LlamaCpp], ids: Tensor, config: Config, log) -> list[dict]:
    """A row for each phase of every repeat, engine and batch size: its seconds, tokens and joules (None without a counter).

    The engines take turns, so that a machine that slows down slows all of them. The first round is not counted.
    """
    rows = []
    rounds = [(repeat, batch) for batch in config.batch_sizes for repeat in range(-1, config.repeats)]
    for repeat, batch in log.progress(rounds, "throughput", "round"):
        for name, engine in engines.items():
            steps = config.new_tokens if repeat >= 0 else 1
            for row in _generate(engine, ids[:batch], steps):
                if repeat >= 0:
                    rows.append({"weights": name, "batch": batch, "repeat": repeat} | row)
    return rows


def _generate(engine: Torch | LlamaCpp, ids: Tensor, steps: int) -> list[dict]:
    """Time a prefill and `steps` greedy steps after it."""
    rows = []
    phases = (
        ("prefill", lambda: engine.prefill(ids), ids.numel()),
        ("decode", lambda: engine.decode(steps), len(ids) * steps),
    )
    for phase, run, tokens in phases:
        with energy.measured() as joules:
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds = time.perf_counter() - start
        rows.append({"phase": phase, "seconds": seconds, "tokens": tokens, "joules": joules()})
    return rows


def _metrics(
    rows: list[dict], name: str, engine: Torch | LlamaCpp, config: Config, bandwidth: float, products: int, suffix: str
) -> dict:
    """The metrics of the engine whose rows are called `name`; `suffix` is put after the names of its metrics. products:
    multiply-adds of a token."""
    metrics = {}
    for batch in config.batch_sizes:
        full = suffix + ("" if batch == config.batch_sizes[0] else f"/batch{batch}")
        for phase in ("prefill", "decode"):
            speeds = [row["tokens"] / row["seconds"] for row in _select(rows, name, phase, batch)]
            speed = metric(median(speeds), higher_is_better=True, unit="tokens/s")
            metrics[f"{phase}_tokens_per_second{full}"] = speed
        metrics |= _energy(_select(rows, name, "decode", batch), engine, batch, products, full)
    seconds = [row["seconds"] for row in _select(rows, name, "decode", config.batch_sizes[0])]
    share = engine.bytes_read / (min(seconds) / config.new_tokens) / bandwidth
    metrics[f"weights_mb{suffix}"] = metric(engine.bytes_read / 1e6, higher_is_better=False, unit="MB")
    metrics[f"decode_bandwidth_share{suffix}"] = metric(share, higher_is_better=True, unit="share")
    return metrics


def _select(rows: list[dict], name: str, phase: str, batch: int) -> list[dict]:
    return [row for row in rows if (row["weights"], row["phase"], row["batch"]) == (name, phase, batch)]


def _energy(decoded: list[dict], engine: Torch | LlamaCpp, batch: int, products: int, suffix: str) -> dict:
    """Joules per decoded token: `decode_joules_per_token` if they were measured, else `decode_joules_per_token_estimate`."""
    if joules := sum(row["joules"] or 0 for row in decoded):
        value = joules / sum(row["tokens"] for row in decoded)
        return {f"decode_joules_per_token{suffix}": metric(value, higher_is_better=False, unit="J")}
    value = energy.estimated(engine.bytes_read / batch, products, engine.itemsize)
    return {f"decode_joules_per_token_estimate{suffix}": metric(value, higher_is_better=False, unit="J")}


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
