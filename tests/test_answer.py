"""Is QAT worth it: what is compared with what, the verdict from known differences, and how often it errs by chance."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from reports.answer import EQUIVALENCE, MEASURES, Difference, _verdict, answers
from reports.cells import Cell, Measurement
from reports.comparisons import compare
from reports.items import Stratum
from reports.prose import _change, sentences
from reports.run import Run
from reports.statistics import Interval, flips
from reports.tables import answer as answer_table
from reports.tables._entries import change

ANY = Interval(0.0, -1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["better"], "yes"),
        (["better", "equivalent", "undecided"], "yes"),
        (["worse", "undecided", "equivalent"], "no"),
        (["equivalent"] * 3, "no"),
        (["better", "worse", "equivalent"], "mixed"),
        (["equivalent", "equivalent", "undecided"], "undecided"),
        ([], "no control"),
    ],
)
def test_the_verdict(outcomes, verdict):
    names = ("perplexity", "kl", "zero_shot")
    beyond = {name: Difference(ANY, outcome, "windows", None) for name, outcome in zip(names, outcomes, strict=False)}
    assert _verdict({"perplexity": Difference(ANY, "better", "windows", None)}, beyond) == verdict
    assert _verdict({}, beyond) == ""


@pytest.mark.parametrize(
    ("against_ptq", "verdict"),
    [
        (["better", "undecided"], "yes"),
        (["worse", "equivalent"], "no"),  # only fine-tuning is worse still
        (["better", "worse"], "mixed"),
        (["equivalent", "equivalent"], "no"),
        (["undecided", "equivalent"], "undecided"),
    ],
)
def test_better_than_the_control_is_not_enough(against_ptq, verdict):
    """A method that hardly moves is nearer to full precision than anything fine-tuned, and may gain nothing all the same."""
    names = ("perplexity", "kl")
    beyond = {
        "perplexity": Difference(ANY, "equivalent", "windows", None),
        "kl": Difference(ANY, "better", "windows", None),
    }
    plain = {name: Difference(ANY, outcome, "windows", None) for name, outcome in zip(names, against_ptq, strict=True)}
    assert _verdict(plain, beyond) == verdict


def row(
    scheme,
    method,
    kind,
    nll,
    kl=None,
    right=None,
    seed=0,
    seconds=10.0,
    text=("text",),
    tokens=64,
    second=None,
    calibrated=64,
):
    """A cell with a value for each window, of a second text too, and answers to the questions of each task."""
    trains = kind not in ("reference", "ptq")
    run = Run(
        seconds=seconds,
        host_memory_mb=100.0 * seconds,
        device_memory_mb=3.0 * seconds,
        training_tokens=tokens if trains else math.nan,
        text_tokens=tokens if trains else math.nan,
        trained_on=text if trains else (),
        calibration_tokens=calibrated,
    )
    cell = Cell("m", scheme, method, seed, kind, run=run)
    measured = {"perplexity": [nll], "perplexity-c4": [second], "kl_mean": [kl], "zero_shot_avg8": right}
    for name, strata in measured.items():
        if strata is not None and strata[0] is not None:
            mean = float(np.mean([stratum.mean() for stratum in strata]))
            of_text = name.startswith("perplexity")
            value = float(np.exp(mean)) if of_text else mean
            change = "relative" if of_text else {"kl_mean": "difference"}.get(name, "")
            cell.metrics[name] = Measurement(value, higher_is_better=not change, change=change, protocol="p")
            cell.samples[name] = tuple(Stratum(values, "x") for values in strata)
    return cell


def ask(*rows, margins=EQUIVALENCE):
    return answers(rows, margins)


def test_a_text_that_some_lack_leaves_no_verdict():
    nll = np.linspace(2, 4, 40)
    rows = [
        row("w3", "gptq", "ptq", nll, second=nll),
        row("w3", "gptq-after-fine_tune", "control_ptq", nll),
        row("w3", "peqa", "qat", nll - 0.2, second=nll),
    ]
    (answer,) = ask(*rows)
    assert answer.verdict == "undecided" and answer.missing == ("perplexity-c4",) and "perplexity" in answer.beyond
    assert "they were not compared in perplexity (c4)" in sentences([answer], {})
    (whole,) = ask(rows[0], row("w3", "gptq-after-fine_tune", "control_ptq", nll, second=nll), rows[2])
    assert whole.verdict == "yes" and whole.missing == ()


def test_methods_that_are_level_on_one_text_are_chosen_by_the_other():
    """Else each half takes another of two controls, and a part of QAT's lead on the second text is the worse control's."""
    nll = np.linspace(2, 4, 40)
    wiggle = np.where(np.arange(40) % 2, 0.01, -0.01)  # the halves of the first text prefer different controls
    (answer,) = ask(
        row("w3", "gptq", "ptq", nll, second=nll),
        row("w3", "gptq-after-tune", "control_ptq", nll - 0.1 + wiggle, second=nll - 0.1),
        row("w3", "gptq-after-fast", "control_ptq", nll - 0.1 - wiggle, second=nll - 0.05),
        row("w3", "peqa", "qat", nll - 0.2, second=nll - 0.12),
    )
    assert answer.control[0].method == "gptq-after-tune" and answer.halves == {}
    assert answer.beyond["perplexity-c4"].interval.value == pytest.approx(math.expm1(-0.02))


def test_a_text_of_one_window_chooses_no_method_by_halves():
    nll = np.linspace(2, 4, 40)
    one = nll[:1]
    (answer,) = ask(
        row("w3", "gptq", "ptq", nll, second=one),
        row("w3", "qronos", "ptq", nll - 0.5, second=one),
        row("w3", "gptq-after-tune", "control_ptq", nll - 0.6, second=one),
        row("w3", "peqa", "qat", nll - 0.7, second=one),
    )
    assert answer.ptq[0].method == "qronos" and answer.halves == {}
    assert answer.against_ptq["perplexity"].interval.value == pytest.approx(math.expm1(-0.2))


def test_there_is_nothing_to_win_only_if_that_is_so_on_every_text():
    nll = np.linspace(2, 4, 40)
    for second, verdict in ((0.001, "nothing to win"), (0.5, "no control")):
        (answer,) = ask(
            row("none", "full_precision", "reference", nll, second=nll),
            row("w3", "gptq", "ptq", nll + 0.002, second=nll + second),
            row("w3", "peqa", "qat", nll + 0.002, second=nll),
        )
        assert answer.verdict == verdict and answer.lost.value == pytest.approx(math.expm1(max(second, 0.002)))


@pytest.mark.parametrize(("calibrated", "said"), [(128, False), (64, True), (32, True), (math.nan, False)])
def test_a_control_that_is_calibrated_on_no_more_than_qat_reads_may_be_better(calibrated, said):
    nll = np.linspace(2, 4, 40)
    (answer,) = ask(
        row("w3", "gptq", "ptq", nll),
        row("w3", "gptq-after-fine_tune", "control_ptq", nll - 0.1, calibrated=calibrated),
        row("w3", "peqa", "qat", nll - 0.2),
    )
    assert (f"is calibrated on {calibrated:.0f} tokens, no more than QAT reads" in sentences([answer], {})) == said


def test_each_text_is_a_measure():
    """QAT is better on the text that methods are chosen by, and worse on another: the measures disagree."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 40))
    for second, verdict in ((-0.05, "yes"), (0.05, "mixed"), (0.0, "yes")):
        (answer,) = ask(
            row("w3", "gptq", "ptq", noise[0] + 3, second=noise[0] + 3),
            row("w3", "gptq-after-fine_tune", "control_ptq", noise[0] + 3, second=noise[0] + 3),
            row("w3", "peqa", "qat", noise[1] + 2.9, second=noise[1] + 3 + second),
        )
        assert answer.verdict == verdict and list(answer.beyond) == ["perplexity", "perplexity-c4"]
        assert answer.beyond["perplexity-c4"].interval.value == pytest.approx(math.expm1(second), abs=0.01)
        told = sentences([answer], {})
        assert f"perplexity (c4) {100 * answer.beyond['perplexity-c4'].interval.value:+z.1f} %" in told
        table = answer_table.table([], SimpleNamespace(answers=[answer]))
        assert "perplexity (c4) against fine-tuned PTQ" in table.columns


def entries(answer):
    table = answer_table.table([], SimpleNamespace(answers=[answer]))
    return dict(zip(table.columns, table.rows[0], strict=True))


BASE = np.linspace(2, 4, 40)
WOBBLE = 0.01 * np.sin(np.arange(40))
PTQ = row("w3", "gptq", "ptq", BASE + 0.5, seconds=20.0, calibrated=math.nan)  # that reads no text has no seeds
CONTROL = row("w3", "gptq-after-tune", "control_ptq", BASE + 0.4 + WOBBLE)
QAT = row("w3", "qat", "qat", BASE + 0.3)


def test_qat_is_compared_with_ptq_and_with_that_of_the_fine_tuned_model():
    (answer,) = ask(
        row("none", "full_precision", "reference", BASE),
        row("none", "tune", "control", BASE - 0.1),
        row("w3", "rtn", "ptq", BASE + 0.9),
        PTQ,
        CONTROL,
        row("w3", "qat", "qat", BASE + 0.25 + WOBBLE[::-1], seconds=50.0),
        row("w3", "worse_qat", "qat", BASE + 0.6),
    )
    assert [best[0].method for best in (answer.ptq, answer.control, answer.qat)] == ["gptq", "gptq-after-tune", "qat"]
    assert answer.verdict == "yes" and answer.halves == {}
    assert answer.one_seed and answer.choice is answer.ptq  # another seed may say otherwise
    assert answer.against_ptq["perplexity"].interval.value == pytest.approx(np.expm1(-0.25), abs=0.01)
    assert answer.beyond["perplexity"].interval.value == pytest.approx(np.expm1(-0.15), abs=0.01)
    entry = entries(answer)
    assert entry["QAT worth it"].text == "yes, one seed" and entry["best QAT"].text == "qat"
    assert entry["perplexity against PTQ"].text == "-22.1 % better"
    assert entry["perplexity against fine-tuned PTQ"].text == "-13.9 % better"
    assert entry["time"].value == 2.5 and entry["training tokens"].value == 64
    assert entry["host memory"].text == entry["device memory"].text == "2.5 x"
    sentence = sentences([answer], {})
    assert sentence.startswith("- **m, w3, at 64 training tokens, one seed: `gptq` (PTQ, perplexity 33.1")
    assert "**Open: training had one seed, by which QAT is worth it**" in sentence
    mixed = sentences([replace(answer, verdict="mixed")], {})
    assert "**Open: training had one seed, by which the measures disagree**" in mixed
    assert "`qat` against `gptq-after-tune`: perplexity -13.9 % (better)." in sentence
    assert "2.5 times the time, 2.5 times the host memory and 2.5 times the device memory of `gptq`" in sentence


def test_memory_of_host_and_device_is_never_one_ratio():
    """PTQ that used no accelerator has no memory of one to compare with."""
    ptq = replace(PTQ, run=replace(PTQ.run, device_memory_mb=math.nan))
    (answer,) = ask(ptq, CONTROL, row("w3", "qat", "qat", BASE + 0.2))
    assert "device memory" not in entries(answer) and entries(answer)["host memory"].value == 0.5


def test_quantizing_the_fine_tuned_model_is_neither_ptq_nor_qat():
    """It beats GPTQ in perplexity by what the text gives, and loses in KL by that too: no verdict comes of it."""
    generator = np.random.default_rng(0)
    kl = 0.19 + 0.01 * generator.normal(size=40)
    ptq = row("w4", "gptq", "ptq", BASE + 0.15, kl)
    control = row("w4", "gptq-after-tune", "control_ptq", BASE + 0.08, kl + 0.043)
    (answer,) = ask(ptq, control)
    assert (answer.qat, answer.verdict, answer.choice[0].method) == ([], "", "gptq")
    # A QAT method that does no more than that, but for noise too large to call the two equal.
    noise = generator.normal(0, 0.05, (2, 40))
    noise -= noise.mean(axis=1, keepdims=True)
    (answer,) = ask(ptq, control, row("w4", "qat", "qat", BASE + 0.08 + noise[0], kl + 0.043 + noise[1]))
    assert {m: d.outcome for m, d in answer.against_ptq.items()} == {"perplexity": "better", "kl": "worse"}
    assert {d.outcome for d in answer.beyond.values()} == {"undecided"}
    assert answer.verdict == "undecided" and answer.choice[0].method == "gptq"
    # With a tenth of the noise they are the same: what QAT gains, the text does.
    (answer,) = ask(ptq, control, row("w4", "qat", "qat", BASE + 0.08 + noise[0] / 10, kl + 0.043 + noise[1] / 10))
    assert {d.outcome for d in answer.beyond.values()} == {"equivalent"} and answer.verdict == "no"


@pytest.mark.parametrize("other", [{"text": ("generated",)}, {"text": ("generated", "text")}, {"tokens": 128}])
def test_without_a_control_on_its_text_there_is_no_verdict(other):
    (answer,) = ask(PTQ, CONTROL, row("w3", "qat", "qat", BASE + 0.1, **other))
    assert answer.against_ptq["perplexity"].outcome == "better"
    assert (answer.control, answer.beyond, answer.verdict) == ([], {}, "no control")
    assert answer.choice[0].method == "gptq" and entries(answer)["QAT worth it"].text == "no control, one seed"
    text = " + ".join(other.get("text", ("text",)))
    assert f"No model fine-tuned on {other.get('tokens', 64)} tokens of `{text}`" in sentences([answer], {})


def test_one_kind_alone_answers_nothing():
    (answer,) = ask(row("none", "full_precision", "reference", BASE), row("w4", "gptq", "ptq", BASE + 0.1))
    assert answer.verdict == "" and answer.qat == [] and answer.choice[0].method == "gptq"


def test_seeds_that_differ_widen_the_interval():
    def compare(steps):
        qat = [row("w4", "qat", "qat", BASE + 0.2 + step, seed=seed) for seed, step in enumerate(steps)]
        (answer,) = ask(row("w4", "gptq", "ptq", BASE + 0.3 + WOBBLE), *qat)
        return answer.qat, answer.against_ptq["perplexity"].interval, answer.against_ptq["perplexity"].outcome

    qat, interval, outcome = compare((-0.2, 0.0, 0.2))
    # Student's interval of three seeds that differ by 0.2 nats: the windows add next to nothing.
    half = 4.303 * 0.2 / 3**0.5
    assert len(qat) == 3 and interval.value == pytest.approx(np.expm1(-0.1), abs=0.001)
    assert interval.low == pytest.approx(np.expm1(-0.1 - half), abs=0.01)
    assert interval.high == pytest.approx(np.expm1(-0.1 + half), abs=0.02)
    assert outcome == "undecided"
    qat, interval, outcome = compare((0.0, 0.0, 0.0))  # what differs is the windows alone
    assert interval.high - interval.low < 0.01 and outcome == "better"
    qat, interval, outcome = compare((0.0,))
    assert interval.high - interval.low < 0.01 and outcome == "better"


def test_what_methods_share_with_a_seed_is_not_in_their_difference():
    """All methods read the same text with a seed: where all are 0.2 nats worse with one, that says nothing about which is
    better. What one method alone has with a seed does, and so do seeds that the other has not."""

    def half_width(qat_steps, tuned_steps, first=0):
        qat = [row("w3", "qat", "qat", BASE + 0.2 + step, seed=k) for k, step in enumerate(qat_steps)]
        tuned = [
            row("w3", "tuned", "control_ptq", BASE + 0.3 + WOBBLE + step, seed=first + k)
            for k, step in enumerate(tuned_steps)
        ]
        found = compare(qat, tuned[::-1], "perplexity")  # in whatever order they come
        assert found.value == pytest.approx(np.expm1(np.mean(qat_steps) - np.mean(tuned_steps) - 0.1), abs=0.002)
        return np.log1p(found.high) - np.log1p(found.value)

    steps = (-0.2, 0.0, 0.2)
    of_one = 4.303 * 0.2 / 3**0.5  # Student's, of two degrees of freedom
    assert half_width(steps, steps) < 0.01
    assert half_width(steps, (0.0, 0.0, 0.0)) == pytest.approx(of_one, rel=0.02)
    assert half_width(steps, (0.2, 0.0, -0.2)) == pytest.approx(2 * of_one, rel=0.02)
    assert half_width(steps, steps, first=3) == pytest.approx(2.776 * 0.2 * (2 / 3) ** 0.5, rel=0.02)
    assert half_width((0.1,), (0.0,), first=5) < 0.01  # of a single seed nothing is known, whichever it is


def test_of_sets_of_seeds_what_both_have_is_compared():
    """A seed that one side lacks is of another text; without two in common both sides count as they are."""

    def compared(qat_seeds, tuned_seeds):
        steps = (-0.2, 0.0, 0.2, 0.1)
        qat = [row("w3", "qat", "qat", BASE + 0.2 + steps[k], seed=k) for k in qat_seeds]
        tuned = [row("w3", "tuned", "control_ptq", BASE + 0.3 + WOBBLE + steps[k], seed=k) for k in tuned_seeds]
        return compare(qat, tuned, "perplexity")

    assert compared((0, 1, 2), (0, 1)) == compared((0, 1), (0, 1)) == compared((0, 1), (1, 0, 3))
    apart = compared((0, 1), (1, 2))
    assert apart.value == pytest.approx(np.expm1(-0.3), abs=0.002) and apart.high > 0


def test_the_answers_of_one_task_after_several_seeds_are_not_those_of_one():
    """McNemar's test is of one training's answers."""
    generator = np.random.default_rng(0)
    right = (generator.random((2, 3, 100)) < np.array([[[0.7]], [[0.4]]])).astype(float)

    def of(method, answers):
        return [row("w3", method, "qat", BASE, right=[r], seed=k) for k, r in enumerate(answers)]

    one = compare(*(of(name, answers[:1]) for name, answers in zip(("a", "b"), right, strict=True)), "zero_shot_avg8")
    three = compare(*(of(name, answers) for name, answers in zip(("a", "b"), right, strict=True)), "zero_shot_avg8")
    assert one.p == flips(right[1, 0], right[0, 0]).p
    assert three.value == pytest.approx(right[0].mean() - right[1].mean()) and three.p != one.p


def seeds_of(method, kind, nll, steps):
    return [row("w3", method, kind, nll + step, seed=seed) for seed, step in enumerate(steps)]


@pytest.mark.parametrize(
    ("steps", "verdict", "settled"),
    [
        ((-0.1, -0.1, -0.1), "yes", True),
        ((-0.15, -0.15, -0.03, -0.15), "yes", True),
        ((-0.2, -0.2, -0.2, -0.2, -0.2, -0.2, 0.1), "yes", False),
        ((-0.2, 0.1, 0.3), "undecided", False),
    ],
)
def test_a_verdict_stands_if_it_goes_one_way_with_every_seed(steps, verdict, settled):
    noise = 0.2 * np.random.default_rng(0).normal(size=40)
    noise -= noise.mean()
    tuned = seeds_of("gptq-after-tune", "control_ptq", BASE + 0.4, [0] * len(steps))
    (answer,) = ask(PTQ, *tuned, *seeds_of("qat", "qat", BASE + 0.4 + noise, steps))
    assert answer.verdict == verdict and list(answer.by_seed) == list(range(len(steps)))
    for step, (_, beyond) in zip(steps, answer.by_seed.values(), strict=True):
        assert beyond["perplexity"].interval.value == pytest.approx(np.expm1(step))
    assert answer.settled == settled
    text = sentences([answer], {})
    changes = ", ".join(f"{100 * np.expm1(step):+.1f} %" for step in steps)
    assert f"With each seed alone, perplexity {changes}." in text
    differ = verdict == "yes" and not settled
    assert ("Open: seeds differ; by all of them together QAT is worth it" in text) == differ
    assert ("seeds differ" in entries(answer)["QAT worth it"].text) == differ


def test_a_seed_alone_is_of_the_methods_that_all_seeds_choose():
    """With one seed another method is ahead of both: that is no evidence against the one which is compared."""
    noise = 0.2 * np.random.default_rng(0).normal(size=40)
    tuned = seeds_of("gptq-after-tune", "control_ptq", BASE + 0.4 + WOBBLE, [0] * 3)
    lucky = seeds_of("lucky", "qat", BASE + 0.4 + noise, (0.3, 0.3, -0.9))
    (answer,) = ask(PTQ, *tuned, *lucky, *seeds_of("qat", "qat", BASE + 0.4 + noise, (-0.2, -0.2, -0.2)))
    changes = [beyond["perplexity"].interval.value for _, beyond in answer.by_seed.values()]
    assert answer.qat[0].method == "qat" and changes == pytest.approx([changes[0]] * 3) and answer.settled


def test_what_a_seed_alone_cannot_say_contradicts_nothing():
    """A seed without a control; and a control of one seed, which is open for that."""
    noise = 0.2 * np.random.default_rng(0).normal(size=40)
    qat = seeds_of("qat", "qat", BASE + 0.4 + noise, (-0.2, -0.2, -0.2))
    tuned = seeds_of("gptq-after-tune", "control_ptq", BASE + 0.4 + WOBBLE, (0, 0))
    (answer,) = ask(PTQ, *tuned, *qat)
    assert answer.verdict == "yes" and answer.seeds == 2 and answer.by_seed[2][1] == {}
    assert answer.settled and not answer.seeds_differ and ", not compared." in sentences([answer], {})
    (answer,) = ask(PTQ, CONTROL, *seeds_of("qat", "qat", BASE + 0.4 + noise, (-0.2,) * 6 + (0.1,)))
    assert answer.one_seed and answer.seeds_differ
    text = sentences([answer], {})
    assert "Open: training had one seed, by which QAT is worth it" in text and "seeds differ" not in text


def test_methods_of_one_seed_do_not_compete_with_those_of_several():
    """They have less perplexity, one on each half of the windows; but it is in no interval what another seed would change."""
    even = np.arange(40) % 2 == 0
    many = seeds_of("many", "qat", BASE + 0.1, (0, 0, 0))
    ones = [row("w3", f"one{k}", "qat", BASE + 0.05 - 0.06 * (even == k) + 0.06 * (even != k)) for k in (0, 1)]
    tuned = seeds_of("gptq-after-tune", "control_ptq", BASE + 0.4 + WOBBLE, (0, 0, 0))
    lucky = row("w3", "rtn-after-tune", "control_ptq", BASE)
    (answer,) = ask(PTQ, *tuned, lucky, *many, *ones)
    assert (answer.qat[0].method, answer.control[0].method, answer.halves) == ("many", "gptq-after-tune", {})
    assert answer.verdict == "yes" and answer.seeds == 3 and answer.settled


def test_with_one_seed_there_is_none_alone():
    (answer,) = ask(PTQ, CONTROL, row("w3", "qat", "qat", BASE + 0.3))
    assert answer.by_seed == {} and not answer.seeds_differ


def test_a_method_is_judged_on_the_windows_that_did_not_choose_it():
    """Each of two methods is lucky on one half of the windows: the best of all is no better where it was not chosen."""
    even = np.arange(40) % 2 == 0
    lucky = [
        row("w3", f"qat{i}", "qat", BASE + 0.4 - (0.3 - 0.01 * i) * (even == half)) for i, half in ((0, 1), (1, 0))
    ]
    (answer,) = ask(PTQ, CONTROL, *lucky)
    assert answer.qat[0].method == "qat0" and answer.qat[0].value("perplexity") < 0.9 * CONTROL.value("perplexity")
    assert answer.beyond["perplexity"].outcome == "equivalent" and answer.verdict == "no"
    assert answer.halves == {"qat": ("qat1", "qat0")}
    assert entries(answer)["best QAT"].detail.endswith("halves choose qat1 and qat0)")
    text = sentences([answer], {})
    assert (
        "The halves of the windows choose otherwise than all of them: `qat1` and `qat0` (QAT); the differences" in text
    )
    assert "`qat0`, or what a half of the windows chooses, against `gptq`: perplexity" in text
    assert "would decide" not in text  # more windows of two methods, each on a half, are not those of one pair


def test_the_answer_says_of_how_many_methods_its_are_the_best():
    """Two seeds of luck to choose from beat one."""
    more = row("w3", "qat-more", "qat", BASE + 0.45)
    (answer,) = ask(PTQ, CONTROL, QAT, more)
    told = "They are the best of 1 (PTQ), 1 (fine-tune, then PTQ) and 2 (QAT)"
    assert f"{told}; the luck of a single seed favours the kind of which there are more." in sentences([answer], {})
    (answer,) = ask(PTQ, CONTROL, QAT)
    assert "They are the best of 1 (PTQ), 1 (fine-tune, then PTQ) and 1 (QAT)." in sentences([answer], {})


def test_the_answer_says_that_the_best_ptq_was_not_run_on_the_fine_tuned_model():
    def by(cell, *quantizer):
        return replace(cell, run=replace(cell.run, quantizer=quantizer))

    for quantizer, said in (("gptq",), False), (("awq", "gptq"), True), (("qronos",), True):
        (answer,) = ask(by(PTQ, *quantizer), by(CONTROL, "gptq"), QAT)
        assert answer.ptq_fine_tuned != said
        assert ("`gptq`, the best PTQ, was not run on the fine-tuned model" in sentences([answer], {})) == said


def test_no_verdict_stands_without_all_methods():
    """A method that failed with one of its seeds may be the best."""
    tuned = seeds_of("gptq-after-tune", "control_ptq", BASE + 0.4, [0] * 3)
    qat = seeds_of("qat", "qat", BASE + 0.3, [0] * 3)
    failed = seeds_of("qronos-after-tune", "control_ptq", BASE, [0] * 3)
    failed[1] = replace(failed[1], samples={}, metrics={})
    (answer,) = ask(PTQ, *tuned, *qat)
    assert answer.settled and answer.absent == ()
    (answer,) = ask(PTQ, *tuned, *qat, failed[1])
    assert answer.verdict == "yes" and answer.absent == ("qronos-after-tune",) and not answer.settled
    text = sentences([answer], {})
    assert "Without a result, so that it is open: `qronos-after-tune`." in text and "use" not in text
    assert entries(answer)["QAT worth it"].text == "yes, methods absent"
    elsewhere = replace(failed[1], scheme="w4")
    assert ask(PTQ, *tuned, *qat, elsewhere)[0].absent == ()


def test_a_ptq_that_was_calibrated_once_is_one_seed():
    tuned = seeds_of("gptq-after-tune", "control_ptq", BASE + 0.4, [0] * 3)
    qat = seeds_of("qat", "qat", BASE + 0.3, [0] * 3)
    calibrated = row("w3", "gptq", "ptq", BASE + 0.5)
    assert [ask(ptq, *tuned, *qat)[0].seeds for ptq in (PTQ, calibrated)] == [3, 1]
    assert "Open: calibration had one seed" in sentences(ask(calibrated, *tuned, *qat), {})


def test_a_half_that_chooses_a_text_without_control_leaves_no_verdict():
    even = np.arange(40) % 2 == 0
    a = row("w3", "qat", "qat", BASE + 0.1 - 0.2 * even)
    b = row("w3", "qat-generated", "qat", BASE + 0.11 - 0.2 * ~even, text=("generated",))
    (answer,) = ask(PTQ, CONTROL, a, b)
    assert answer.qat[0].method == "qat" and answer.control and answer.verdict == "no control"


def test_no_change_is_a_plain_zero():
    """Not -0.0."""
    difference = Difference(Interval(-0.0004, -0.0002, 0.01, 0.9), "equivalent", "questions", None)
    assert _change(difference, MEASURES["zero_shot"]) == "+0.0 points (equivalent)"
    assert change(difference.interval, MEASURES["zero_shot"].metric, "tie").detail == "[+0.0, +1.0]"


def test_what_is_undecided_says_how_much_would_decide():
    kl = np.linspace(0.2, 0.6, 40)
    noise = np.random.default_rng(0).normal(size=40)
    noise = 0.2 * (noise - noise.mean()) / noise.std(ddof=1)
    (answer,) = ask(
        row("w3", "gptq", "ptq", BASE + 0.5, kl),
        row("w3", "gptq-after-tune", "control_ptq", BASE + 0.4, kl),
        row("w3", "qat", "qat", BASE + 0.4, kl + 0.06 + noise),
    )
    difference = answer.beyond["kl"]
    # The standard error is 0.2 / 40**0.5, so z is about 1.85 where Holm asks 2.24 of the smaller of two p-values.
    assert difference.outcome == "undecided" and difference.items == "windows"
    assert difference.needed == pytest.approx(40 * (2.241 / 1.85) ** 2, rel=0.15)
    assert "windows would decide)" in sentences([answer], {})


def test_after_several_seeds_no_number_of_windows_is_told():
    """It may be seeds that are missing: more windows do not narrow what these spread."""
    seeds = [row("w3", "qat", "qat", BASE + 0.4 + step, seed=seed) for seed, step in enumerate((-0.2, 0.0, 0.3))]
    (answer,) = ask(row("w3", "gptq", "ptq", BASE + 0.5), row("w3", "tuned", "control_ptq", BASE + 0.45), *seeds)
    difference = answer.beyond["perplexity"]
    assert difference.outcome == "undecided" and difference.needed is None
    assert "would decide" not in sentences([answer], {})


def simulate(count, methods, windows, gain, generator):
    """Verdicts on `count` schemes, whose methods of each kind differ by noise only but for a gain of all QAT in nats.

    Two methods' losses differ by 0.05 nats a window, and so do their KLs; of 128 questions they answer a tenth otherwise.
    """
    rows = []
    for i in range(count):
        base, kl = generator.normal(3, 0.5, windows), generator.uniform(0.3, 0.8, windows)
        right = generator.random((8, 16)) < 0.45
        for kind in ("ptq", "control_ptq", "qat"):
            for method in range(methods):
                nll = base + generator.normal(0, 0.05 / 2**0.5, windows) - gain * (kind == "qat")
                noisy = kl + generator.normal(0, 0.05 / 2**0.5, windows)
                answered = (right ^ (generator.random((8, 16)) < 0.05)).astype(float)
                rows.append(row(f"s{i}", f"{kind}{method}", kind, nll, noisy, [*answered]))
    return [answer.verdict for answer in ask(*rows)]


@pytest.mark.parametrize(("methods", "windows"), [(2, 8), (2, 32), (4, 16), (8, 8), (8, 32)])
def test_equal_methods_seldom_make_a_verdict(methods, windows):
    """Of 400 answers at most 5 % by chance say "yes", however many methods the best was chosen of."""
    verdicts = simulate(400, methods, windows, 0.0, np.random.default_rng(methods + windows))
    assert verdicts.count("yes") <= 20, {verdict: verdicts.count(verdict) for verdict in set(verdicts)}


def test_a_gain_of_a_tenth_is_found():
    """And the verdict is not silent: 10 % less perplexity on 32 windows, or on 8."""
    for windows in (8, 32):
        verdicts = simulate(100, 4, windows, 0.105, np.random.default_rng(windows))
        assert verdicts.count("yes") >= 90, verdicts
