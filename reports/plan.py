"""Whether a run is what the matrix asks for: a result tree may hold those of other configurations and older versions."""

from __future__ import annotations

from typing import Any

OLDER = "its checkpoint was made by an older version"


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
            and all(_is_as_planned(step, plan, config) for step, plan in zip(steps, entry["steps"], strict=True))
            and (allocation is None or _holds(allocation["tokens"], _allocating_tokens(config)))
        )
    except (KeyError, TypeError):
        return OLDER
    return "" if same else "its checkpoint was made with another configuration"


def _is_as_planned(step: dict[str, Any], plan: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a step that ran is the one of the matrix: module, options, text and how much of it."""
    tokens = step["tokens"]
    if any(step[key] != plan[key] for key in ("module", "options")) or (tokens or {}).get("dataset") != plan["dataset"]:
        return False
    if tokens is None:
        return True
    # Batches are recorded of the training budget only; a method may train on calibration text, too.
    return _holds(tokens, _budget(config["training" if "batch_size" in tokens else "calibration"]))


def _budget(section: dict[str, Any]) -> dict[str, Any]:
    """How many tokens the configuration gives a step, as a run records it: in samples."""
    # Checkpointing changes no number, and the text is that of the step.
    budget = {key: value for key, value in section.items() if key not in ("dataset", "gradient_checkpointing")}
    if "tokens" in budget:
        budget["samples"] = budget.pop("tokens") // budget["sequence_length"]
    return budget


def _allocating_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """The tokens by which the configuration allocates bits, as a run records them."""
    return config["allocation"] | {"dataset": config["calibration"]["dataset"]}


def _holds(record: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(record[key] == value for key, value in expected.items())
