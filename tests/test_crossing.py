"""The crossing of QAT's curve with PTQ: values worked out by hand, how often its interval holds the truth, shares."""

import math
from dataclasses import replace

import numpy as np
import pytest

from reports.answer import EQUIVALENCE, answers
from reports.crossing import crossing, crossings, lies_between
from reports.prose import _ahead, crossing_words, sentences
from reports.statistics import Estimate
from tests.test_answer import row

BUDGETS = (8192, 32768, 131072)


def test_a_crossing_lies_on_the_line_in_the_logarithm_of_the_budget():
    budgets = np.array(BUDGETS)
    differences = np.array(
        [
            [0.3, 0.1, -0.1, 0.2, -0.2, 0.1],
            [0.1, -0.1, -0.2, 0.0, 0.1, -0.1],
            [-0.3, -0.3, -0.3, -0.1, -0.1, 0.1],
        ]
    )
    # A quarter of the way of a factor of 4; half of it; ahead everywhere; exactly at a budget; fell back; not at the end.
    expected = [32768 * 4**0.25, 16384, 0, 32768, 32768 * 4**0.5, math.inf]
    assert crossing(budgets, differences) == pytest.approx(expected)
    assert float(crossing(budgets, differences[:, 0])) == pytest.approx(expected[0])


def curve(method, losses, noise, kind="qat", seeds=1, spread=0.0, seed=0, second=None):
    """Cells of a method that has these mean losses at BUDGETS, with noise of its own at each window; `second`: its losses on
    another text."""
    generator = np.random.default_rng(seed)
    cells = []
    for budget, loss in zip(BUDGETS, losses, strict=True):
        for k in range(seeds):
            nll = loss + generator.normal(0, noise, WINDOWS) + TEXT + generator.normal(0, spread)
            cell = row("w3", method, kind, nll, seed=k, tokens=budget, second=None if second is None else second + TEXT)
            cells.append(replace(cell, budget=budget))
    return cells


WINDOWS = 32
TEXT = np.random.default_rng(9).normal(0, 0.5, WINDOWS)  # some windows are harder than others, for all
PTQ = row("w3", "gptq", "ptq", 3.5 + TEXT, calibrated=math.nan)
FULL = row("none", "full_precision", "reference", 3.0 + TEXT)


def test_the_curve_of_known_differences():
    qat = curve("qat", (3.6, 3.4, 3.3), 0.0)
    control = curve("tune", (3.55, 3.5, 3.45), 0.0, kind="control_ptq")
    found = crossings([FULL, PTQ, *qat, *control])["m", "w3"]
    assert [c.method for c in found.curves] == ["qat", "tune"] and found.best.method == "qat"
    assert found.best.crossing.value == found.best.crossing.low == found.best.crossing.high == pytest.approx(16384)
    # PTQ loses 0.5 nats, of which QAT wins 0.2 back, and 0.15 more than fine-tuning does.
    assert found.best.recovered.value == pytest.approx(0.4) and found.best.beyond.value == pytest.approx(0.3)
    assert found.curves[1].crossing.value == pytest.approx(32768) and found.curves[1].beyond is None
    # It is 0.05 nats behind the control, then 0.1 ahead: a third of the way of a factor of 4.
    assert found.best.against_control.value == pytest.approx(8192 * 4 ** (1 / 3))
    assert found.curves[1].against_control is None
    assert crossings([FULL, PTQ, *qat, *control[1:]])["m", "w3"].best.against_control is None  # not with each budget
    assert found.best.minutes(20480) == pytest.approx(10 / 60)


def test_the_same_methods_cross_elsewhere_on_another_text():
    ptq = row("w3", "gptq", "ptq", 3.5 + TEXT, second=3.5 + TEXT)
    qat = [
        c for i, loss in enumerate((3.7, 3.6, 3.4)) for c in curve("qat", (3.6, 3.4, 3.3), 0.0, second=loss)[i : i + 1]
    ]
    control = curve("tune", (3.55, 3.5, 3.45), 0.0, kind="control_ptq", second=3.55)
    (metric, (found, against_control)), *others = crossings([ptq, *qat, *control])["m", "w3"].best.elsewhere.items()
    assert metric.name == "perplexity-c4" and not others
    assert found.value == found.low == found.high == pytest.approx(65536)  # half of the way of a factor of 4
    assert against_control.value == pytest.approx(32768 * 4**0.25)
    told = sentences(answers([ptq, *qat, *control], EQUIVALENCE), crossings([ptq, *qat, *control])).splitlines()[0]
    words = "from 66,000 [66,000, 66,000] training tokens on, and ahead of fine-tuned PTQ from 46,000 [46,000, 46,000]"
    assert f"By perplexity (c4) it is ahead of PTQ {words} training tokens on." in told


def test_the_best_is_of_those_with_the_most_seeds():
    one, three = curve("one", (3.2, 3.1, 3.0), 0.0), curve("three", (3.6, 3.4, 3.3), 0.0, seeds=3)
    found = crossings([FULL, PTQ, *one, *three])["m", "w3"]
    assert found.best.method == "three" and found.curves[0].method == "one"


def test_the_best_is_chosen_by_all_texts_as_for_the_verdict():
    ptq = row("w3", "gptq", "ptq", 3.5 + TEXT, second=3.5 + TEXT)
    a, b = curve("a", (3.4, 3.3, 3.2), 0.0, second=3.2), curve("b", (3.39, 3.29, 3.19), 0.0, second=3.4)
    assert crossings([ptq, *a, *b])["m", "w3"].best.method == "a"
    assert {answer.qat[0].method for answer in answers([ptq, *a, *b], EQUIVALENCE)} == {"a"}


def test_what_is_never_or_always_ahead():
    behind, ahead = (
        crossings([PTQ, *curve("qat", losses, 0.01)])["m", "w3"].best for losses in ((4, 3.9, 3.8), (3, 2, 1))
    )
    assert behind.crossing.value == behind.crossing.low == behind.crossing.high == math.inf and not lies_between(
        behind.crossing
    )
    assert ahead.crossing.value == ahead.crossing.high == 0 and not lies_between(ahead.crossing)
    assert ahead.recovered is None  # nothing says what full precision has
    assert crossings([PTQ, *(c for c in curve("qat", (3.6, 3.4, 3.3), 0) if c.budget == 8192)]) == {}
    assert crossings(curve("qat", (3.6, 3.4, 3.3), 0)) == {}


def test_what_ptq_does_not_lose_cannot_be_recovered():
    full = row("none", "full_precision", "reference", 3.5 + TEXT)
    assert crossings([full, PTQ, *curve("qat", (3.6, 3.4, 3.3), 0.01)])["m", "w3"].best.recovered is None


def test_the_words_of_a_crossing():
    """An end of the interval beyond the budgets that were run says so, on whichever side; one seed is no advice."""
    (found,) = crossings([PTQ, *curve("qat", (3.6, 3.4, 3.3), 0.0, seeds=3)])["m", "w3"].curves
    for (value, low, high), expected in (
        ((16384, 9000, 20490), ("16,000", "[9,000, 20,000]")),
        ((16384, 0, math.inf), ("16,000", "[under 8,192, over 131,072]")),
        ((math.inf, 50000, math.inf), ("over 131,072", "[50,000, over 131,072]")),
        ((math.inf, math.inf, math.inf), ("over 131,072", "[over 131,072, over 131,072]")),
        ((0, 0, 0), ("under 8,192", "[under 8,192, under 8,192]")),
    ):
        assert crossing_words(Estimate(value, low, high), found.budgets) == expected

    for ends, expected in (
        ((0, 0, 0), "ahead of x from 8,192 training tokens on, the least that was tried"),
        ((0, 0, 9000), "ahead of x from under 8,192 [under 8,192, 9,000] training tokens on"),
        ((math.inf,) * 3, "not ahead of x within 131,072 training tokens"),
        ((math.inf, 9000, math.inf), "ahead of x from over 131,072 [9,000, over 131,072] training tokens on"),
    ):
        assert _ahead("x", Estimate(*ends), found.budgets) == expected

    def ask(cells):
        return answers(cells, EQUIVALENCE)

    def told(seeds, *more):
        cells = [FULL, PTQ, *curve("qat", (3.6, 3.4, 3.3), 0.0, seeds=seeds), *more]
        return sentences(ask(cells), crossings(cells)).splitlines()[0]

    ahead = "`qat` is ahead of `gptq` from 16,000 [16,000, 16,000] training tokens on"
    won = " With 131,072 tokens `qat` wins back 40 % [40, 40] of what `gptq` loses"
    assert told(1) == f"- **m, w3: {ahead}** (by perplexity; one seed).{won}."
    assert told(3) == f"- **m, w3: {ahead}** (by perplexity; 3 seeds).{won}."  # without a control it is no advice
    # Two thirds of the way of a factor of 4, since 0.1 nats behind and then 0.05 ahead.
    tuned = curve("gptq-after-tune", (3.5, 3.45, 3.4), 0.0, seeds=3, kind="control_ptq")
    use = "use PTQ below 21,000 [21,000, 21,000] training tokens (0.17 minutes here), `qat` from there on"
    tuned_ptq = "the best PTQ of a model fine-tuned on as much"
    of_tuned = f", and ahead of {tuned_ptq}"
    beyond = f"{won}, 20 % [20, 20] beyond fine-tuning on the same text."
    both = f"{ahead}{of_tuned} from 21,000 [21,000, 21,000] training tokens on"
    assert told(3, *tuned) == f"- **m, w3: {use}** (by perplexity; 3 seeds): {both}.{beyond}"
    better = curve("gptq-after-tune", (3.3, 3.2, 3.1), 0.0, seeds=3, kind="control_ptq")
    assert told(3, *better).startswith(
        f"- **m, w3: {ahead}, and not ahead of {tuned_ptq} within 131,072 training tokens** (by perplexity; 3 seeds). With"
    )
    worse = curve("gptq-after-tune", (3.9, 3.9, 3.9), 0.0, seeds=3, kind="control_ptq")
    least = f"{of_tuned} from 8,192 training tokens on, the least that was tried"
    use = use.replace("21,000", "16,000")
    assert told(3, *worse).startswith(f"- **m, w3: {use}** (by perplexity; 3 seeds): {ahead}{least}. With")
    early = sentences(*(f([FULL, PTQ, *worse, *curve("qat", (3.4, 3.3, 3.2), 0.0, seeds=3)]) for f in (ask, crossings)))
    assert early.startswith(
        "- **m, w3: use `qat` from 8,192 training tokens on, the least that was tried** (by perplexity"
    )


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (3, 0.05)])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds, spread):
    held = 0
    for trial in range(200):
        cells = curve("qat", (3.6, 3.4, 3.3), 0.2, seeds=seeds, spread=spread, seed=trial)
        estimate = crossings([PTQ, *cells])["m", "w3"].best.crossing
        held += estimate.low <= 16384 <= estimate.high
    assert held / 200 >= 0.92


def test_the_best_of_many_seldom_seems_to_cross_early():
    """Twelve methods that reach PTQ with the largest budget only: the luckiest of them does so sooner by its own windows."""
    early = 0
    for trial in range(200):
        cells = [c for k in range(12) for c in curve(f"qat{k}", (3.6, 3.55, 3.5), 0.3, seed=100 * trial + k)]
        early += crossings([PTQ, *cells])["m", "w3"].best.crossing.high < BUDGETS[-1]
    assert early / 200 <= 0.08
