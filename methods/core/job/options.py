"""Building a frozen `Config` dataclass from a mapping, with errors that name the value and the choices. No torch."""

from __future__ import annotations

import argparse
import difflib
import math
import types
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")
LARGEST = 10**9  # of a number in an option: more is a slip, which torch would answer with an overflow or with no memory
NORM = 3.0  # of the scale search: as good as 2.4 and better than 2 or 4 on the tuning text, in half the time (reports/LOG.md)


def choose(name: str, choices, what: str) -> str:
    """`name` if it is one of `choices`; otherwise a ValueError that lists them and suggests the nearest."""
    if name in choices:
        return name
    near = difflib.get_close_matches(str(name), [str(c) for c in choices], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}; valid: {', '.join(map(str, sorted(choices)))}.{hint}")


def require_positive(config: Any, *names: str) -> None:
    """For a Config's `__post_init__`: ValueError for the first of these fields that is not above zero; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be positive")


def require_between(config: Any, low: float, high: float, *names: str) -> None:
    """For a Config's `__post_init__`: ValueError for the first of these fields that is outside; None is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must be from {low:g} to {high:g}")


class Options:
    """Base of the groups of options: each checks its own fields and passes on to the next group's check."""

    def __post_init__(self):
        pass


@dataclass(frozen=True)
class ScaleOptions(Options):
    """How a method that rounds to nearest, or starts from it, chooses the scale of a group."""

    scale: Literal["minmax", "search", "hqq"] = "search"
    gamma: float = 1.0  # with minmax: multiplies the min-max scale
    norm: float = NORM  # with search: the error that is minimized, sum |w - w_q|^norm

    def __post_init__(self):
        super().__post_init__()
        require_between(self, 0.1, 10, "norm")
        require_between(self, 0.01, 1, "gamma")
        if self.scale != "minmax" and self.gamma != 1:
            raise ValueError(
                f"gamma {self.gamma} is for scale minmax; with scale {self.scale} every group gets its own"
            )

    def require_defaults(self) -> None:
        """For a step that starts from codes and keeps their scales: ValueError if it asks for others."""
        default = {f.name: f.default for f in fields(type(self))}
        for name in ("scale", "gamma", "norm"):
            if getattr(self, name) != default[name]:
                raise ValueError(
                    f"option {name} {getattr(self, name)} would be ignored: a step that starts from codes keeps their scales"
                )


@dataclass(frozen=True)
class CompensationOptions(ScaleOptions):
    """Of rounding column by column (methods/core/compensation.py)."""

    damp: float = 0.01  # share of the mean diagonal of H that is added to it
    act_order: bool = True  # columns by descending diagonal of H
    static_groups: bool = True  # scales from the original weights, before any update
    block_size: int = 128  # columns updated at once; rounded up to whole groups
    batch_size: int = 4  # calibration sequences per forward pass
    norm: float = 2.0
    weighted: bool = True  # with search: weigh each column's error by its diagonal entry of H
    unreached: Literal["error", "rtn"] = "error"  # experts that no calibration token reaches

    def __post_init__(self):
        super().__post_init__()
        require_between(self, 1e-9, 1, "damp")
        require_positive(self, "block_size", "batch_size")


def check_compensation(scheme, config: CompensationOptions) -> None:
    """ValueError for a combination that our checkpoint format cannot store."""
    if config.act_order and not config.static_groups and scheme.weights.group_size is not None:
        raise ValueError("act_order with groups needs static_groups: otherwise a group's columns are not neighbors")


@dataclass(frozen=True)
class LowRankOptions(Options):
    """A trained term `(alpha / rank) A B`."""

    rank: int = 32
    alpha: float = 32.0

    def __post_init__(self):
        super().__post_init__()
        require_between(self, 1, 65536, "rank")
        require_between(self, 1e-3, 65536, "alpha")


@dataclass(frozen=True)
class TrainingOptions(Options):
    """What every training method has. Each says in its docstring what its rate is relative to."""

    learning_rate: float | None = None  # None: by the number of steps
    warm_up: float = 0.1  # share of the steps

    def __post_init__(self):
        super().__post_init__()
        # Every rate, of scales and magnitudes too: relative to what is trained, so more than 1 leaves nothing of it.
        require_between(self, 1e-9, 1, *(f.name for f in fields(self) if f.name.endswith("learning_rate")))
        if not 0 <= self.warm_up < 1:
            raise ValueError(f"warm_up is {self.warm_up}; it is a share of the steps, at least 0 and below 1")


def build_config(cls: type[T], options: dict[str, Any], where: str) -> T:
    """`cls(**options)`. ValueError for an unknown key, a missing key or a value of the wrong type."""
    hints = get_type_hints(cls)
    names = {f.name for f in fields(cls)}
    values = {}
    for key, value in options.items():
        choose(key, names, f"option of {where}")
        values[key] = _checked(value, hints[key], f"{where}: option {key}")
    required = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    if missing := required - options.keys():
        raise ValueError(f"{where}: option {sorted(missing)[0]!r} is required")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _checked(value: Any, hint: Any, what: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{what} is {value!r}; valid: {', '.join(map(repr, get_args(hint)))}")
        return value
    allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if sequence := next((a for a in allowed if get_origin(a) is tuple), None):
        if not isinstance(value, list | tuple) or not value:
            raise ValueError(f"{what} is {value!r}; it must be a list")
        return tuple(_checked(v, get_args(sequence)[0], what) for v in value)
    if float in allowed and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML 1.1 reads 2e-5, without a dot, as text
        except (ValueError, OverflowError):
            pass
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{what} is {value}; it must be a finite number")
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise ValueError(f"{what} is {value:g}; it must be at most {LARGEST:g}")
    # bool is an int in Python, but `bits: true` is a mistake.
    if not any(isinstance(value, t) and (t is bool or not isinstance(value, bool)) for t in allowed):
        names = " or ".join("none" if t is type(None) else t.__name__ for t in allowed)
        raise ValueError(f"{what} is {value!r}; it must be {names}")
    return value


def mapping(text: str) -> dict[str, Any]:
    """A command-line argument that is a YAML or JSON mapping."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a YAML or JSON mapping")
    return value
