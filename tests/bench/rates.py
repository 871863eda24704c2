"""Learning rates of every method that trains, by one search for all: the table behind the defaults (reports/LOG.md).

python -m tests.bench.rates --steps 8        (SmolLM2-135M on two cores with AVX512-BF16: about an hour; 32 steps, too)

Each method is trained on steps of 4 x 256 tokens of the training text at W4 and W3 in groups of 64, with the same number of
candidates, and judged on the tuning text (DROP), which is neither trained on nor evaluated on, by perplexity and, among those
within 1 % of the best, which the report calls equivalent, by KL from full precision (`ranking`): a rate that reaches the same
perplexity farther from the model is not better. There are five candidates at 8 steps; at 32 the two best of these and half of
the best, at 128 the best of these and half of it, at 2 the best of 8, twice and four times it. The default of a method is the
best over 8 and 32 steps, as far as it was searched (`best`; tests/test_rates.py holds the code to it); 2 and 128 tell how
rates depend on the length (`rate_at`). The low-rank control is judged as what it is there for, after Qronos. Trials without
KL are older, on grids whose scales had no sign; they count for a method until it has others.
Finished trials are kept in reports/published/rates/trials.jsonl with a hash of their texts, and a killed search goes on where
it was; take out of the file what a change of the code has made wrong.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from evals.divergence import divergence
from methods.core.job import registry, runtime
from methods.core.job.files import SEAL, sha256_files
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme
from methods.core.tokens import read_windows, sample_windows
from methods.core.training import parametrizations

NAME = "smollm2-135m"
MODEL = Path("resources/models") / NAME
TOKENS = Path("resources/tokens") / NAME
TRIALS = Path("reports/published/rates/trials.jsonl")
SCHEMES = {f"w{bits}-g64": {"weights": {"bits": bits, "group_size": 64}} for bits in (4, 3)}
KINDS = ("calibration", "training", "tuning")
BATCH, SEQUENCE = 4, 256
WINDOWS, WINDOW = 16, 512  # of the tuning text
MARGIN = 0.01  # of perplexity, within which candidates are equal
LENGTHS = (2, 8, 32, 128)  # optimizer steps
SEARCHED = (8, 32)  # those of which the default is the best
KEPT = {32: 2, 128: 1}  # candidates of the next shorter length that are tried again


@dataclass(frozen=True)
class Entry:
    """A method in the search: its module, options and start, and five candidates, each a value for every rate option."""

    module: str
    rates: tuple[str, ...]
    candidates: tuple[tuple[float, ...], ...]
    options: tuple[tuple[str, str], ...] = ()
    start: str = ""  # the method whose checkpoint it starts from
    then: str = ""  # the method that quantizes what it leaves, before it is judged

    @property
    def defaults(self) -> tuple:
        """Equal for entries that share their default rates: whichever method's codes they start from, but not rounding."""
        return self.module, self.options, self.then, bool(self.start)


LOW_RANK = ("learning_rate", "scale_learning_rate")
SCALES = ((1e-3,), (2e-3,), (4e-3,), (8e-3,), (1.6e-2,))
LR_QAT = ((4e-3, 4e-3), (4e-3, 8e-3), (3e-2, 4e-3), (3e-2, 8e-3), (1e-1, 8e-3))  # 1.6e-3 moves no code, as 4e-3
FULL = ((4e-3, 2e-3), (2e-3, 2e-3), (8e-3, 2e-3), (4e-3, 5e-4), (4e-3, 8e-3))
CONTROL = ((1.4e-4,), (3e-4,), (6e-4,), (1.2e-3,), (2.4e-3,))
ENTRIES = {
    "peqa": Entry("peqa", ("learning_rate",), SCALES),
    "lr_qat": Entry("lr_qat", LOW_RANK, LR_QAT),
    "dl_qat": Entry(
        "dl_qat",
        ("learning_rate", "magnitude_learning_rate"),
        ((1e-3, 4e-3), (1e-3, 8e-3), (1e-3, 1.6e-2), (3e-4, 8e-3), (3e-3, 8e-3)),
    ),
    "llm_qat": Entry(
        "llm_qat",
        ("learning_rate",),
        SCALES,
        (("scale", "search"),),
    ),
    "llm_qat minmax": Entry("llm_qat", ("learning_rate",), SCALES),
    "qronos-after-fine_tune": Entry("fine_tune", ("learning_rate",), CONTROL, then="qronos"),
    "fine_tune full": Entry("fine_tune", ("learning_rate",), CONTROL, (("variant", "full"),)),
    "lsq": Entry("full_qat", LOW_RANK, FULL),
    "torchao_qat": Entry("full_qat", ("learning_rate",), SCALES, (("scales", "recomputed"), ("scale", "minmax"))),
    "qad": Entry(
        "full_qat", ("learning_rate",), SCALES, (("scales", "frozen"), ("loss", "distillation")), start="gptq"
    ),
    "block_ap": Entry(
        "block_ap", LOW_RANK, ((8e-3, 8e-3), (8e-3, 2e-3), (1.6e-2, 8e-3), (1.6e-2, 2e-3), (3.2e-2, 8e-3))
    ),
    "peqa-from-gptq": Entry("peqa", ("learning_rate",), SCALES, start="gptq"),
    "peqa-from-qronos": Entry("peqa", ("learning_rate",), SCALES, start="qronos"),
    "lr_qat-from-gptq": Entry("lr_qat", LOW_RANK, LR_QAT, start="gptq"),
}


class Search:
    """Runs trials of one scheme; what all its trials share is made once."""

    def __init__(self, scheme: str):
        self.scheme = Scheme.from_dict(scheme, SCHEMES[scheme])
        self.dtype = runtime.compute_dtype(MODEL)
        self.starts = {"": load_model(MODEL, self.dtype)}
        self.windows = read_windows(TOKENS / "tuning.safetensors", WINDOW)[0][:WINDOWS].to(runtime.device())
        self.expected = list(self.logits(self.starts[""]))

    @torch.inference_mode()
    def logits(self, model) -> Iterator[Tensor]:
        """(window, vocabulary) of each window of the tuning text."""
        model.to(runtime.device())
        for window in self.windows:
            yield model(input_ids=window[None]).logits[0]

    @torch.inference_mode()
    def judge(self, model) -> tuple[float, float]:
        """Perplexity on the tuning text, and KL there from full precision, in nats per token."""
        nll, kl = [], []
        for window, expected, logits in zip(self.windows, self.expected, self.logits(model), strict=True):
            nll.append(F.cross_entropy(logits[:-1].float(), window[1:]))
            kl.append(divergence(expected, logits).mean())
        return float(torch.stack(nll).mean().exp()), float(torch.stack(kl).mean())

    def ptq(self, method: str):
        """The model as a method that does not train leaves it, at its defaults."""
        if method not in self.starts:
            self.starts[method] = self.quantized(copy.deepcopy(self.starts[""]), method)
        return self.starts[method]

    def quantized(self, model, method: str, seed: int = 0):
        tokens = None
        if registry.load("methods", method).METHOD.reads == "calibration":
            tokens, _ = sample_windows(TOKENS / "calibration.safetensors", 16, 512, seed)
        return self.run(method, model, {}, tokens, seed)

    def trial(self, entry: Entry, candidate: tuple[float, ...], steps: int, seed: int = 0) -> tuple[float, float]:
        """`judge` of the model after so many steps."""
        tokens, _ = sample_windows(TOKENS / "training.safetensors", steps * BATCH, SEQUENCE, seed)
        start = self.ptq(entry.start) if entry.start else self.starts[""]
        options = dict(entry.options) | dict(zip(entry.rates, candidate, strict=True))
        tokens = tokens.unflatten(0, (-1, 1, BATCH))
        model = self.run(entry.module, copy.deepcopy(start), options, tokens, seed)
        return self.judge(self.quantized(model, entry.then, seed) if entry.then else model)

    def run(self, method: str, model, options: dict, tokens, seed: int = 0):
        torch.manual_seed(seed)
        module = registry.load("methods", method)
        given = {"teacher": lambda: copy.deepcopy(self.starts[""])} if module.METHOD.distills else {}
        with tempfile.TemporaryDirectory() as folder:
            return module.apply(model, self.scheme, module.Config(**options), tokens, RunLog(Path(folder)), **given)


def remember_scales() -> None:
    """Let a scale search of the same weight be made once for all trials."""
    found: dict[tuple, tuple] = {}

    def remembered(weight, grid, search: ScaleSearch, importance=None):
        if search.kind != "search":
            return choose_scale(weight, grid, search, importance)
        key = (tuple(weight.shape), float(weight.double().sum()), float(weight[0].double().sum()), grid, search.norm)
        if key not in found:
            found[key] = choose_scale(weight, grid, search, importance)
        return found[key]

    parametrizations.choose_scale = remembered


def trials() -> list[dict]:
    """The finished trials on the texts that are there now."""
    lines = TRIALS.read_text().splitlines() if TRIALS.exists() else []
    return [trial for trial in map(json.loads, lines) if trial["texts"] == texts()]


@functools.cache
def texts() -> str:
    """A hash of the tokens that trials are made with: of the seals, for the order of facts in a file is random."""
    seals = []
    for kind in KINDS:
        with safe_open(TOKENS / f"{kind}.safetensors", framework="pt") as file:
            seals.append((kind, file.metadata()[SEAL]))
    return sha256_files(seals)[:16]


def candidates(name: str, steps: int, done: list[dict]) -> list[tuple[float, ...]]:
    """The candidates to try: all at 8 steps; at 2 the best of these, twice and four times it; at more the best of the next
    shorter length, and half the best."""
    if steps == SEARCHED[0]:
        return list(ENTRIES[name].candidates)
    if steps < SEARCHED[0]:
        found = ranking(name, [SEARCHED[0]], done)[0]
        return [tuple(factor * rate for rate in found) for factor in (1, 2, 4)]
    shorter = LENGTHS[LENGTHS.index(steps) - 1]
    kept = ranking(name, [shorter], done)[: KEPT[steps]]
    return list(dict.fromkeys([*kept, tuple(rate / 2 for rate in kept[0])]))


def best(name: str, done: list[dict]) -> tuple[float, ...]:
    """The default rates of a method, from rounding or from another's codes: the best over schemes, the methods that it starts
    from, and those of 8 and 32 steps that were searched."""
    return ranking(name, list(SEARCHED), done)[0]


def ranking(name: str, lengths: list[int], done: list[dict]) -> list[tuple[float, ...]]:
    """Candidates of a method by their mean log perplexity over its schemes, starts and searched lengths, the best first; of
    those within MARGIN of the best, the one with the lowest mean KL.

    Only those that were tried in all of these are compared. SystemExit if there are none.
    """
    method = ENTRIES[name]
    own = [t for t in done if ENTRIES[t["method"]].defaults == method.defaults and t["steps"] in lengths]
    rows: dict[tuple, dict[tuple[float, ...], tuple[float, float]]] = {}
    for t in [t for t in own if "kl" in t] or own:
        row = rows.setdefault((t["method"], t["scheme"], t["steps"]), {})
        row[tuple(t["rates"])] = math.log(t["perplexity"]), t.get("kl", math.inf)
    common = set.intersection(*map(set, rows.values())) if rows else set()
    if not common:
        raise SystemExit(f"{method.module}: search {' and '.join(map(str, lengths))} steps first")
    means = {c: [sum(row[c][i] for row in rows.values()) / len(rows) for i in (0, 1)] for c in common}
    equal = min(loss for loss, _ in means.values()) + math.log1p(MARGIN)

    def place(candidate: tuple[float, ...]) -> tuple[bool, float, float]:
        loss, kl = means[candidate]
        return loss > equal, kl if loss <= equal else loss, loss

    return sorted(common, key=place)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rates", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[8], choices=LENGTHS)
    parser.add_argument("--methods", nargs="+", default=list(ENTRIES), choices=list(ENTRIES))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    needed = [MODEL, *(TOKENS / f"{kind}.safetensors" for kind in KINDS)]
    if missing := [str(path) for path in needed if not path.exists()]:
        sys.exit(f"needs {' '.join(missing)}: snakemake --cores 8 -- {' '.join(missing)}")
    runtime.set_up(args.threads, seed=0)
    remember_scales()
    searches: dict[str, Search] = {}
    for steps, scheme, name in itertools.product(args.steps, args.schemes, args.methods):
        entry = ENTRIES[name]
        if not (entry.then or registry.load("methods", entry.module).METHOD.quantizes) and scheme != args.schemes[0]:
            continue  # a control that is not quantized has no bits
        done = trials()
        same = [t for t in done if (t["method"], t["scheme"], t["steps"]) == (name, scheme, steps)]
        tried = {tuple(t["rates"]) for t in same if "kl" in t}
        for candidate in candidates(name, steps, done):
            if candidate in tried:
                continue
            search = searches.setdefault(scheme, None) or Search(scheme)
            searches[scheme] = search
            start = time.perf_counter()
            try:
                perplexity, kl = search.trial(entry, candidate, steps)
            except FloatingPointError:
                perplexity = kl = float("inf")
            trial = {"method": name, "scheme": scheme, "steps": steps, "rates": candidate}
            trial |= {"perplexity": perplexity, "kl": kl}
            trial |= {"texts": texts(), "seconds": round(time.perf_counter() - start, 1), "device": runtime.processor()}
            trial["date"] = f"{datetime.now(UTC):%Y-%m-%d}"
            with open(TRIALS, "a") as file:
                file.write(json.dumps(trial) + "\n")
            judged = f"{perplexity:.3f}, KL {kl:.4f} ({trial['seconds']} s)"
            print(f"{name} {scheme} {steps} steps {candidate}: {judged}", flush=True)
    for method in ("rtn", "gptq", "qronos"):
        for scheme, search in searches.items():
            print("{} {}: {:.3f}, KL {:.4f}".format(method, scheme, *search.judge(search.ptq(method))))
    print(table(trials()))


def table(done: list[dict]) -> str:
    """Markdown: perplexity and KL on the tuning text of every trial, the lowest perplexity of a row in bold."""
    lines = ["| method | scheme | steps | rates: perplexity (KL) |", "|---|---|---|---|"]
    groups: dict[tuple, list[dict]] = {}
    for t in done:
        groups.setdefault((t["method"], t["scheme"], t["steps"]), []).append(t)
    for (method, scheme, steps), group in sorted(groups.items()):
        best = min(t["perplexity"] for t in group)
        texts = []
        for t in sorted(group, key=lambda t: t["rates"]):
            text = f"{', '.join(f'{r:g}' for r in t['rates'])}: {t['perplexity']:.2f}"
            text += f" ({t['kl']:.3f})" if "kl" in t else ""
            texts.append(f"**{text}**" if t["perplexity"] == best else text)
        lines.append(f"| {method} | {scheme} | {steps} | {'; '.join(texts)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
