"""Every metric that the report knows by name: its heading, its column, and how its values and changes are written.

A metric of a result file that is not here is compared and is in the table of all numbers, and has no column of its own. A
name with a slash is a part of what it begins with: `boolq/acc` is a task's, `decode_tokens_per_second/batch8` another batch
size's. What stands after a dash is another text: `perplexity-c4` is the perplexity of the evaluation `perplexity-c4`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Change:
    """How a change of a metric is written: times the factor, with this number of decimals, and with the unit.

    relative: whether the change is a share of the value itself. Such a change is written as a multiple where it is large.
    """

    unit: str
    factor: float = 100
    digits: int = 1
    relative: bool = False

    def written(self, value: float) -> str:
        return f"{self.factor * value:+z.{self.digits}f}{self.unit}"


POINTS = Change(" points")
NATS = Change("", factor=1, digits=3)
RELATIVE = Change(" %", relative=True)


@dataclass(frozen=True)
class Metric:
    """A metric or a fact of a run.

    heading: of its column, without the % of a share.
    role: "headline" stands in the main table and in every comparison, "detail" against full precision only; "cost" and "fact"
        are known from run.json, the others from a result file.
    axis: its name on the axis of a figure, if it is drawn against size.
    stands_in_for: the metric without which it is shown.
    divergence: whether it is a comparison with full precision already.
    unit: of a fact. That of other metrics is in the result file.
    machine_dependent: whether two runs of the same code differ in it.
    """

    name: str
    heading: str = ""
    higher_is_better: bool = False
    share: bool = False
    role: str = ""
    axis: str = ""
    change: Change = POINTS
    stands_in_for: str = ""
    divergence: bool = False
    unit: str = ""
    machine_dependent: bool = False

    @property
    def column_heading(self) -> str:
        return self.heading + (" %" if self.share else "")

    def on(self, text: str) -> Metric:
        """The same of another text, by what the evaluation calls that."""
        return replace(self, name=f"{self.name}-{text}", heading=f"{self.heading} ({text})" if self.heading else "")

    def texts(self, measured: Collection[str]) -> list[str]:
        """The further texts that it was measured on."""
        return sorted(name.removeprefix(f"{self.name}-") for name in measured if name.startswith(f"{self.name}-"))

    def everywhere(self, measured: Collection[str]) -> list[Metric]:
        """Itself and the same of other texts, as far as they were measured."""
        return [*([self] if self.name in measured else []), *map(self.on, self.texts(measured))]


def _score(name: str, heading: str, axis: str = "", stands_in_for: str = "") -> Metric:
    return Metric(name, heading, True, share=True, role="headline", axis=axis, stands_in_for=stands_in_for)


def _timing(name: str, higher_is_better: bool) -> Metric:
    return Metric(name, higher_is_better=higher_is_better, machine_dependent=True)


DECODE_RATE = "decode_tokens_per_second"
LLAMA_CPP = "llama.cpp"  # the part of such a metric that is of its engine
ENERGY, ENERGY_ESTIMATE = "decode_joules_per_token", "decode_joules_per_token_estimate"  # of a decoded token

REGISTER = {
    metric.name: metric
    for metric in (
        Metric("perplexity", "perplexity", role="headline", axis="perplexity", change=RELATIVE),
        _score("zero_shot_avg8", "zero-shot avg8", axis="zero-shot average, %"),
        _score("zero_shot_avg6", "zero-shot avg6", stands_in_for="zero_shot_avg8"),
        _score("mmlu_0shot", "MMLU 0-shot"),
        _score("mmlu_5shot", "MMLU 5-shot"),
        Metric("kl_mean", "KL", role="headline", axis="KL, nats", change=NATS, divergence=True),
        Metric("zero_shot_margin", "zero-shot margin", True, role="headline", change=NATS),
        Metric("mmlu_margin_0shot", "MMLU 0-shot margin", True, role="detail", change=NATS),
        Metric("mmlu_margin_5shot", "MMLU 5-shot margin", True, role="detail", change=NATS),
        Metric("kl_p99", "KL p99", role="detail"),
        Metric("top1_agreement", "top-1 agreement", True, share=True, role="detail"),
        Metric("kl_floor"),
        Metric("bits_per_weight"),
        Metric("size_mb"),
        Metric("kv_cache_bytes"),
        _timing("prefill_tokens_per_second", True),
        _timing(DECODE_RATE, True),
        _timing("decode_bandwidth_share", True),
        Metric("weights_mb"),
        Metric("logit_error"),
        _timing(ENERGY, False),
        _timing(ENERGY_ESTIMATE, False),
        Metric("seconds", "time", role="cost", unit="s", machine_dependent=True),
        Metric("host_memory_mb", "host memory", role="cost", unit="MB", machine_dependent=True),
        Metric("device_memory_mb", "device memory", role="cost", unit="MB", machine_dependent=True),
        Metric("training_tokens", role="fact", unit="tokens"),
        Metric("training_flops", role="fact", unit="FLOP"),
        Metric("moved", higher_is_better=True, role="fact", unit="share"),
        Metric("weight_error", role="fact", unit="relative"),
    )
}
COSTS = [metric for metric in REGISTER.values() if metric.role == "cost"]
FACTS = [metric for metric in REGISTER.values() if metric.role in ("cost", "fact")]
DRAWN = [metric for metric in REGISTER.values() if metric.axis]


def find(name: str) -> Metric:
    """The metric of a name, for a part that of the whole; one that is not registered has a name only."""
    plain, _, text = name.partition("/")[0].partition("-")
    return (REGISTER[plain].on(text) if text else REGISTER[plain]) if plain in REGISTER else Metric(name)


def is_part(name: str) -> bool:
    """Whether a metric is about a part of another one's items, such as a single task."""
    return "/" in name


def headlines(measured: Collection[str]) -> list[Metric]:
    """Those to show of the metrics that were measured."""
    return [metric for metric in _of_role("headline", measured) if metric.stands_in_for not in measured]


def details(measured: Collection[str]) -> list[Metric]:
    """Those that are shown against full precision only."""
    return _of_role("detail", measured)


def _of_role(role: str, measured: Collection[str]) -> list[Metric]:
    return [m for metric in REGISTER.values() if metric.role == role for m in metric.everywhere(measured)]


def measured_as(name: str, measured: Collection[str]) -> str:
    """The metric itself, or the one that stands in for it where it was not measured."""
    stand_in = next((metric.name for metric in REGISTER.values() if metric.stands_in_for == name), name)
    return name if name in measured else stand_in


def significant(value: float, digits: int = 4) -> str:
    """A number with this many significant digits, zeros at its end too (25.00), powers of ten only if very large or small."""
    if value >= 1e6:
        return f"{value:.2e}"
    return f"{value:.0f}" if value >= 10**digits / 10 else f"{value:#.{digits}g}".rstrip(".")
