"""A cell's `run.json`: the facts of the run, and whether it is the run that the matrix asks for."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods.core.job.files import sha256_file

NAN = math.nan
FEW_RATES = 4  # a method that trains by the steps of each layer's grid has as many as layers
OLDER = "its checkpoint was made by an older version"


@dataclass(frozen=True)
class Layer:
    """A quantized layer, with the error of its weights relative to those that were quantized; NaN if it has no meaning."""

    name: str
    bits: int
    weight_error: float


@dataclass(frozen=True)
class Run:
    """The facts of a run; NaN and empty before the cell has run.

    start: the method whose checkpoint the last step started from. kinds: of all steps, see methods.core.job.registry.
    quantizer: the steps with their options, without those of full precision. seconds, training_tokens, training_flops,
    trained_on, learning_rates, memory: of the whole chain of steps; trained_on has each text once, text_tokens are of these,
    memory is the peak. calibration_tokens: the most that a step which does not train reads. The other facts are the last
    step's: trained_share, moved and codes_changed are shares of the model's parameters, of those trained and of the integer
    codes. formats: of the quantized layers. grid: the scheme apart from the number of bits.
    """

    start: str = ""
    kinds: tuple[str, ...] = ()
    quantizer: tuple[str, ...] = ()
    seconds: float = NAN
    host_memory_mb: float = NAN
    device_memory_mb: float = NAN
    training_tokens: float = NAN
    training_flops: float = NAN
    trained_on: tuple[str, ...] = ()
    text_tokens: float = NAN
    learning_rates: tuple[float, ...] = ()
    calibration_tokens: float = NAN
    trained_share: float = NAN
    moved: float = NAN
    codes_changed: float = NAN
    weight_error: float = NAN
    parameters: int = 0
    compute_dtype: str = ""
    layers: tuple[Layer, ...] = ()
    formats: frozenset[str] = frozenset()
    grid: dict[str, Any] = field(default_factory=dict)
    losses: tuple[float, ...] = ()  # of every step of training

    @property
    def rates(self) -> str:
        """The learning rates of the chain, of many the range; empty if nothing was trained, or by an older version."""
        rates = [f"{rate:.3g}" for rate in sorted(self.learning_rates)]
        return f"{rates[0]} to {rates[-1]}" if len(rates) > FEW_RATES else ", ".join(rates)

    @property
    def training_text(self) -> str:
        """The texts that the chain was trained on, in words; empty if nothing was trained."""
        return " + ".join(self.trained_on)


def read_run(record: dict[str, Any], folder: Path) -> Run:
    """From the contents of `run.json`; the losses of training are beside it in `folder`."""
    steps, whole, last = record["steps"], record["chain"], record["steps"][-1]
    training, weights = last["training"], record["scheme"].get("weights", {})
    quantized = [layer for layer in record["layers"] if layer["bits"]]
    return Run(
        start=steps[-2]["method"] if len(steps) > 1 else "",
        kinds=tuple(step["kind"] for step in steps),
        quantizer=tuple(
            f"{step['module']} {json.dumps(step['options'], sort_keys=True)}"
            for step in steps
            if step["kind"] not in ("reference", "control")
        ),
        seconds=float(whole["seconds"]),
        host_memory_mb=float(whole["peak_memory_mb"]["host"]),
        device_memory_mb=float(whole["peak_memory_mb"].get("device", NAN)),
        training_tokens=float(whole["training_tokens"] or NAN),
        training_flops=float(whole.get("training_flops") or NAN),  # not in a run of an older version
        trained_on=tuple(whole["trained_on"]),
        text_tokens=float(whole["text_tokens"] or NAN),
        learning_rates=tuple(
            rate for step in steps if step["training"] for rate in step["training"].get("learning_rates", [])
        ),
        calibration_tokens=max((_read(step) for step in steps if step["tokens"] and not step["training"]), default=NAN),
        trained_share=training["parameters"] / record["model"]["parameters"] if training else NAN,
        moved=training["moved"] if training else NAN,
        codes_changed=_mean_over_weights(quantized, "codes_changed"),
        weight_error=_mean_over_weights(quantized, "weight_error"),
        parameters=record["model"]["parameters"],
        compute_dtype=record["compute_dtype"],
        layers=tuple(_layer(layer) for layer in quantized),
        formats=frozenset(layer.get("format", "") for layer in quantized),
        grid={"symmetric": weights.get("symmetric", True)}
        | {tokens: record["scheme"].get(tokens) for tokens in ("activations", "kv_cache")},
        losses=_losses(folder / "training/metrics.jsonl", training.get("metrics_sha256")) if training else (),
    )


def _read(step: dict[str, Any]) -> float:
    """How many tokens a step reads."""
    return float(step["tokens"]["samples"] * step["tokens"]["sequence_length"])


def _layer(layer: dict[str, Any]) -> Layer:
    error = layer["weight_error"]
    return Layer(layer["layer"], layer["bits"], NAN if error is None else error)


def _mean_over_weights(layers: list[dict[str, Any]], fact: str) -> float:
    """Mean of a layer's fact over all weights; NaN where no layer has it."""
    known = [(math.prod(layer["shape"]), layer[fact]) for layer in layers if layer.get(fact) is not None]
    return sum(n * value for n, value in known) / sum(n for n, _ in known) if known else NAN


def _losses(path: Path, sha256: str | None) -> tuple[float, ...]:
    """ValueError if it is another file; a run of an older version, or by one that writes none, has no hash."""
    if sha256 and path.is_file() and sha256_file(path) != sha256:
        raise ValueError(f"{path} has been changed or damaged: its hash is not that in run.json")
    lines = path.read_text().splitlines() if path.is_file() else []
    return tuple(step["loss"] for step in json.loads(f"[{','.join(lines)}]"))


def mismatch(record: dict[str, Any], entry: dict[str, Any], config: dict[str, Any]) -> str:
    """Why a run is not what the configuration asks for, empty if it is. `entry`: the cell in matrix.json."""
    if not entry["steps"] or not {"steps", "chain"} <= record.keys():
        return OLDER
    steps, allocation = record["steps"], record["allocation"]
    try:
        same = (
            record["scheme"] == config["schemes"][entry["scheme"]]
            and record["chain"]["kind"] == entry["kind"]
            and len(steps) == len(entry["steps"])
            and all(_is_as_planned(step, plan) for step, plan in zip(steps, entry["steps"], strict=True))
            and (allocation is None or _holds(allocation["tokens"], _allocating_tokens(config)))
        )
    except (KeyError, TypeError):
        return OLDER
    return "" if same else "its checkpoint was made with another configuration"


def _is_as_planned(step: dict[str, Any], plan: dict[str, Any]) -> bool:
    """Whether a step that ran is the one of the matrix: module, options, text and how much of it."""
    tokens = step["tokens"]
    if any(step[key] != plan[key] for key in ("module", "options")) or (tokens is None) != (plan["tokens"] is None):
        return False
    return tokens is None or _holds(tokens, plan["tokens"])


def _allocating_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The tokens by which the configuration allocates bits, as a run records them."""
    return config["allocation"] | {"dataset": config["calibration"]["dataset"]}


def _holds(record: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(record[key] == value for key, value in expected.items())
