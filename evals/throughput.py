"""Tokens per second of prefill and decode, and energy per token, of a checkpoint on this machine's low-bit kernels.

The layers that are timed multiply with packed integers (evals/core/kernels.py), not with dequantized weights. The same model
with bf16 and with fp32 weights is timed in the same process, turn by turn, and so is llama.cpp, where it is installed, with
the checkpoint's GGUF export: what many deploy (evals/core/engines.py). Before anything is timed, logits are compared with
those of the dequantized checkpoint in fp32: their relative error may be at most twice that of the bf16 model, plus 0.01; for
llama.cpp, which rounds activations to 8 bits, twice that of the fp32 model with activations rounded so. What has no kernel
or no export gets the reason instead of a number.

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
from methods.core.job.sources import version_of
from methods.core.model import gguf
from methods.core.model.anatomy import block_linears
from methods.core.model.checkpoint import load_model
from methods.core.model.experts import is_expert
from methods.core.model.layers import QuantizedLinear, are_large, quantized_layers
from methods.core.tokens import check_length

PACKAGE = "llama-cpp-python"
EVALUATION = Evaluation(machine_dependent=True, packages=(PACKAGE,))
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
    check_length(model, config.prompt + config.new_tokens, "prompt and new_tokens")
    if any(map(is_expert, block_linears(model))):
        raise ValueError("speeds of mixtures are not measured: their experts are called one by one here")
    device = model.device
    random = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (max(config.batch_sizes), config.prompt), generator=random).to(device)
    about = {"kernel": None, "no_kernel": None, "llama_cpp": None, "no_llama_cpp": None}
    with ExitStack() as stack:
        engines: dict[str, Torch | LlamaCpp] = {}
        try:
            deployed = stack.enter_context(_llama_cpp(model, checkpoint, config))
            about["llama_cpp"] = {"version": version_of(PACKAGE), "build": deployed.build, "types": deployed.types}
            engines[LLAMA_CPP] = deployed
        except NoKernel as missing:
            about["no_llama_cpp"] = str(missing)
            log.info(f"llama.cpp is not timed: {missing}")
        for name, dtype in DENSE.items():
            engines[name] = Torch(_weights_only(load_model(checkpoint, dtype).to(device)), dtype)
        if quantized_layers(model):
            try:
                engines["packed"], about["kernel"] = _packed(model, checkpoint)
            except NoKernel as missing:
                about["no_kernel"] = str(missing)
                log.departure(f"no low-bit kernel of PyTorch's on this machine: {missing}")
        metrics = _logit_errors(engines, ids[:1], bool(quantized_layers(model)))
        rows = _time(engines, ids, config, log)
    bandwidth = read_bandwidth(device)
    # Names without a suffix are of the model as it would be used: packed, or in 16 bits if it is not quantized.
    plain = "packed" if about["kernel"] else None if about["no_kernel"] else "bfloat16"
    products = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, "in_features"))
    for name, engine in engines.items():
        metrics |= _metrics(rows, name, engine, config, bandwidth, products, "" if name == plain else f"/{name}")
    about |= {"bandwidth": bandwidth, "energy": energy.SOURCE}
    protocol = f"prompt{config.prompt}-new{config.new_tokens}/{torch.get_num_threads()}-threads/{processor()}"
    items = {column: [row[column] for row in rows] for column in rows[0]}
    return Result(protocol, metrics, len(rows), partial=False, data=about, items=items)


@contextmanager
def _llama_cpp(model: nn.Module, checkpoint: Path, config: Config) -> Iterator[LlamaCpp]:
    """llama.cpp on the checkpoint, on the processor. NoKernel if it is not installed, or has no such weights."""
    if model.device.type != "cpu":
        raise NoKernel(f"it is timed on processors only, and this is on {model.device.type}")
    if version_of(PACKAGE) is None:
        raise NoKernel(f"{PACKAGE} is not installed")
    length = config.prompt + config.new_tokens
    with tempfile.TemporaryDirectory() as folder:
        file = export_for_llama_cpp(checkpoint, Path(folder))
        engine = LlamaCpp(file, max(config.batch_sizes), length, torch.get_num_threads())
    with closing(engine):  # it has the file open, whose name is no longer needed
        yield engine


def _packed(model: nn.Module, checkpoint: Path) -> tuple[Torch, str]:
    """The packed model and the names of its kernels. NoKernel if a layer has none."""
    if any(getattr(m, kind, None) for m in model.modules() for kind in ("input_tokens", "output_tokens")):
        raise NoKernel("it quantizes activations or KV cache, and the kernels quantize weights only")
    packed = load_model(checkpoint, torch.bfloat16).to(model.device)
    kernel = pack(packed)
    return Torch(packed, torch.bfloat16), kernel


def _weights_only(model: nn.Module) -> nn.Module:
    """The model with dense layers that do not quantize their tokens, and without the codes that such layers do not read."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.input_tokens = layer.output_tokens = None
            layer.packed = layer.scale = layer.zero_point = None
    return model


def _logit_errors(engines: dict[str, Torch | LlamaCpp], ids: Tensor, quantized: bool) -> dict:
    """Relative error of the logits of what computes the checkpoint, the larger of a prefill's and of the step's after it.

    ValueError if one is more than twice that of bf16, plus 0.01; or, for llama.cpp with codes, twice that of the exact model
    whose activations are rounded as it does.
    """

    def error(found: list[Tensor]) -> float:
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))

    exact = engines["float32"].logits(ids)
    rounding, metrics = {"packed": error(engines["bfloat16"].logits(ids))}, {}
    rounding[LLAMA_CPP] = rounding["packed"]
    if quantized and LLAMA_CPP in engines:
        rounding[LLAMA_CPP] = max(rounding["packed"], error(_with_rounded_activations(engines["float32"], ids)))
    for name, suffix in (("packed", ""), (LLAMA_CPP, f"/{LLAMA_CPP}")):
        if name not in engines:
            continue
        found, allowed = error(engines[name].logits(ids)), 2 * rounding[name] + 0.01
        if not found <= allowed:
            raise ValueError(
                f"the logits of {name} are off by {found:.3g} (allowed: {allowed:.3g}): it does not compute the checkpoint's "
                "product, so nothing was timed"
            )
        metrics[f"logit_error{suffix}"] = metric(found, higher_is_better=False, unit="relative")
    return metrics


def _with_rounded_activations(engine: Torch, ids: Tensor) -> list[Tensor]:
    """Logits of a model whose block layers read 8-bit integers, with a scale for every 32 in a row, as in llama.cpp."""

    def rounded(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        blocks = inputs[0].unflatten(-1, (-1, gguf.BLOCK))
        scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(blocks.dtype).tiny)
        return ((blocks / scale).round() * scale).flatten(-2), *inputs[1:]

    handles = [layer.register_forward_pre_hook(rounded) for layer in block_linears(engine.model).values()]
    try:
        return engine.logits(ids)
    finally:
        for handle in handles:
            handle.remove()


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
