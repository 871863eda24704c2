"""Two methods compared on the command line: known differences, with each seed, and what cannot be compared."""

import subprocess
import sys
from dataclasses import replace

import pytest

from reports.pair import table
from tests.test_answer import BASE, WOBBLE, row, seeds_of

PTQ = row("w3", "gptq", "ptq", BASE + 0.5, kl=BASE / 10)


def test_a_known_difference_with_each_seed():
    tuned = seeds_of("tuned", "control_ptq", BASE + 0.4 + WOBBLE, (0.0, 0.1, -0.1))
    qat = seeds_of("qat", "qat", BASE + 0.4, (-0.1, 0.0, -0.4))
    ((model, scheme, tokens, mine, theirs, metric, difference, p, alone),) = table([*tuned, *qat], [("qat", "tuned")])
    assert (model, scheme, tokens, mine, theirs, metric) == ("m", "w3", "", "qat", "tuned", "perplexity")
    # Of -0.1, -0.1 and -0.3 nats, by Student's t of two degrees of freedom: -0.167 +- 0.287.
    assert difference.startswith("-15.4 % [-36.5 %, +12.") and p == "0.13"
    assert alone == "-9.5 % (0), -9.5 % (1), -25.9 % (2)"


def test_budgets_are_compared_with_their_own_and_what_does_not_train_with_all():
    qat, tuned = (
        [replace(row("w3", name, kind, BASE + step, tokens=budget), budget=budget) for budget in (64, 128)]
        for name, kind, step in (("qat", "qat", 0.3), ("tuned", "control_ptq", 0.4))
    )
    rows = table([PTQ, *qat, *tuned], [("qat", "tuned"), ("gptq", "qat")])
    assert [(tokens, theirs) for _, _, tokens, _, theirs, *_ in rows] == [
        ("64", "tuned"),
        ("128", "tuned"),
        ("64", "qat"),
        ("128", "qat"),
    ]
    # Only perplexity is in both.
    assert all(difference.startswith("+22.1 % [+22.1") for *_, difference, _, _ in rows[2:])


def test_a_method_that_is_not_there():
    with pytest.raises(ValueError, match="no scheme has results of qat and of gptq; there are: gptq"):
        table([PTQ], [("qat", "gptq")])


def test_on_the_command_line(smoke):
    def run(*arguments):
        command = [sys.executable, "-m", "reports.pair", *arguments]
        return subprocess.run(command, cwd=smoke, capture_output=True, text=True)

    done = run("results/smoke", "gptq:rtn")
    rows = [[entry.strip() for entry in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert {row[1] for row in rows} >= {"w4-g64", "w3-g64", "w2-g64"}
    assert {row[5] for row in rows} >= {"perplexity", "kl_mean"}
    (w2,) = [row for row in rows if row[1] == "w2-g64" and row[5] == "perplexity"]
    assert float(w2[6].split()[0]) < -5  # GPTQ is far ahead there
    assert "'gptq' is not METHOD:RIVAL" in run("results/smoke", "gptq").stderr
    assert "no-such-tree" in run("no-such-tree", "gptq:rtn").stderr
