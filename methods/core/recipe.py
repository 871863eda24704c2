"""A recipe is a list of steps, each applied to what the step before left. What a whole chain of them is, and what it cost.

No torch: the workflow checks recipes with it, `python -m methods` records chains with it, and reports read the record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from methods.core.job.registry import QUANTIZING, Method

# What a cell is by its whole chain; the last three are quantized.
CHAIN_KINDS = ("reference", "transform", "control", "ptq", "control_ptq", "qat")


def quantized(kinds: Iterable[str]) -> bool:
    """Whether a chain of steps of these kinds leaves codes."""
    return any(kind in QUANTIZING for kind in kinds)


def chain_kind(steps: Sequence[tuple[str, bool]]) -> str:
    """What a chain of steps is; of each its kind, and whether it trains.

    It is qat if a step that is no control trained and one quantizes, in whatever order; control_ptq if it is quantized
    after training in full precision only; ptq if nothing was trained. Without codes it is control, transform or reference.
    """
    kinds = [kind for kind, _ in steps]
    if quantized(kinds):
        if any(trains and kind != "control" for kind, trains in steps):
            return "qat"
        return "control_ptq" if "control" in kinds else "ptq"
    return next((kind for kind in ("control", "transform") if kind in kinds), "reference")


def check_chain(steps: Sequence[tuple[str, Method]]) -> None:
    """ValueError, naming the step, unless each step takes what the last one left. steps: names and declarations."""
    for (before, first), (name, then) in pairwise(steps):
        if "reference" in (first.kind, then.kind):
            name = before if first.kind == "reference" else name
            raise ValueError(f"{name!r} is the model itself, which every recipe starts from anyway")
        if first.leaves not in then.takes:
            raise ValueError(
                f"{name!r} takes {' or '.join(then.takes)}, but {before!r} before it leaves {first.leaves}"
            )


def chain(steps: Sequence[dict[str, Any]], allocation: dict[str, Any] | None) -> dict[str, Any]:
    """Kind, seconds, training tokens, their texts and peak memory of a whole chain: what `run.json` says beside the steps.

    `training_tokens` and `training_flops` are those of all trainings, `text_tokens` those of the texts, which two steps may
    both have read.
    Seconds count what a step took, the generation of its tokens, and the measuring behind an allocation of bits.
    """
    trained = [step for step in steps if step["training"]]
    flops = [step["training"].get("flops") for step in trained]
    memory: dict[str, float] = {}
    for step in steps:
        for where, megabytes in step["peak_memory_mb"].items():
            memory[where] = max(memory.get(where, 0.0), megabytes)
    generated = {}  # a text that two steps read was generated once
    for tokens in (step["tokens"] or {} for step in steps):
        if "seconds" in tokens:
            generated[tokens["dataset"], tokens.get("text_sha256")] = float(tokens["seconds"])
    texts: dict[str, int] = {}
    for step in trained:
        name = step["tokens"]["dataset"]
        texts[name] = max(texts.get(name, 0), step["tokens"]["samples"] * step["tokens"]["sequence_length"])
    seconds = sum(step["seconds"]["apply"] for step in steps) + sum(generated.values())
    return {
        "kinds": [step["kind"] for step in steps],
        "kind": chain_kind([(step["kind"], step["training"] is not None) for step in steps]),
        "seconds": seconds + (allocation["seconds"] if allocation else 0),
        "training_tokens": sum(step["training"]["tokens"] for step in trained),
        # A step of an older version did not count them.
        "training_flops": sum(flops) if None not in flops else None,
        "trained_on": list(texts),
        "text_tokens": sum(texts.values()),
        "peak_memory_mb": memory,
    }
