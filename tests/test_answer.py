"""Is QAT worth it: the verdict from known differences, and what the training text alone does taken off."""

import math

import numpy as np
import pytest

from evals.core.statistics import Interval
from reports.answer import _verdict, answers
from reports.results import Sample
from reports.tables import answer as answer_table

BETTER, WORSE, TIE = Interval(-0.2, -0.3, -0.1), Interval(0.2, 0.1, 0.3), Interval(0.0, -0.1, 0.1)


@pytest.mark.parametrize(
    ("perplexity", "net", "kl", "zero_shot", "verdict"),
    [
        (BETTER, None, None, None, "yes"),
        (WORSE, None, None, None, "no"),
        (TIE, None, TIE, TIE, "tie"),
        (BETTER, BETTER, TIE, TIE, "yes"),
        (BETTER, TIE, TIE, TIE, "tie"),  # all of the gain is the training text's
        (BETTER, TIE, WORSE, TIE, "no"),
        (BETTER, BETTER, WORSE, TIE, "mixed"),
        (TIE, None, TIE, WORSE, "yes"),  # an accuracy is better when it is higher
        (None, None, None, None, ""),
    ],
)
def test_the_verdict(perplexity, net, kl, zero_shot, verdict):
    assert _verdict(perplexity, net, kl, zero_shot) == verdict


def row(scheme, method, nll, tokens=math.nan, seed=0, seconds=10.0):
    metric = {"protocol": "p", "higher_is_better": False}
    row = {"model": "m", "scheme": scheme, "method": method, "seed": seed, "unquantized": scheme == "none"}
    row |= {"metrics": {"perplexity": metric}, "samples": {"perplexity": Sample((nll,), ("x",))}}
    row |= {
        "perplexity": float(np.exp(nll.mean())),
        "training_tokens": tokens,
        "trained_on": "text" if tokens > 0 else "",
    }
    return row | {"seconds": seconds, "memory_mb": 100.0 * seconds}


def frame(*rows):
    import pandas as pd

    return pd.DataFrame(rows)


BASE = np.linspace(2, 4, 40)
WOBBLE = 0.01 * np.sin(np.arange(40))


def test_what_the_text_alone_does_is_taken_off():
    cells = frame(
        row("none", "full_precision", BASE),
        row("none", "tune", BASE - 0.10 + WOBBLE, tokens=64),
        row("w3", "rtn", BASE + 0.9),
        row("w3", "gptq", BASE + 0.50, seconds=20.0),
        row("w3", "qat", BASE + 0.25 + WOBBLE[::-1], tokens=64, seconds=50.0),
        row("w3", "worse_qat", BASE + 0.6, tokens=64),
    )
    (found,) = answers(cells)
    assert found.ptq[0]["method"] == "gptq" and found.qat[0]["method"] == "qat" and found.verdict == "yes"
    assert found.perplexity.value == pytest.approx(np.expm1(-0.25), abs=0.01)
    assert found.net.value == pytest.approx(np.expm1(-0.15), abs=0.01)
    entries = dict(zip(answer_table([found]).columns, answer_table([found]).rows[0], strict=True))
    assert entries["QAT worth it"].text == "yes" and entries["best QAT"].text == "qat"
    assert entries["time"].value == 2.5 and entries["memory"].text == "2.5 x" and entries["training tokens"].value == 64
    # A control of another text takes nothing off.
    cells.at[1, "trained_on"] = "other"
    assert answers(cells)[0].net is None


def test_one_kind_alone_answers_nothing():
    (found,) = answers(frame(row("none", "full_precision", BASE), row("w4", "gptq", BASE + 0.1)))
    assert found.verdict == "" and found.qat == [] and found.choice[0]["method"] == "gptq"


def test_seeds_are_averaged_window_by_window():
    cells = frame(
        row("none", "full_precision", BASE),
        *[row("w4", "gptq", BASE + 0.3 + sign * WOBBLE, seed=seed) for seed, sign in enumerate((1, -1))],
        *[row("w4", "qat", BASE + 0.2 + sign * 20 * WOBBLE, tokens=8, seed=seed) for seed, sign in enumerate((1, -1))],
    )
    (found,) = answers(cells)
    assert len(found.qat) == 2 and found.perplexity.value == pytest.approx(np.expm1(-0.1))
    assert found.perplexity.high - found.perplexity.low < 1e-6  # the seeds' wobble cancels on every window
