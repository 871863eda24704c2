"""The default learning rates are those that the search of all methods found (tests/bench/rates.py)."""

import json

import pytest

from methods import block_ap, dl_qat, fine_tune, full_qat, llm_qat, lr_qat, peqa
from methods.core.job.files import ROOT
from tests.bench import rates

DEFAULTS = {
    "peqa": (peqa.RATES["rounding"],),
    "peqa-from-gptq": (peqa.RATES["codes"],),
    "lr_qat": (lr_qat.RATE, lr_qat.SCALE_RATES["rounding"]),
    "lr_qat-from-gptq": (lr_qat.RATE, lr_qat.SCALE_RATES["codes"]),
    "dl_qat": (dl_qat.RATE, dl_qat.MAGNITUDE_RATE),
    "llm_qat": (llm_qat.RATES["search"],),
    "llm_qat minmax": (llm_qat.RATES["minmax"],),
    "qronos-after-fine_tune": (fine_tune.RATES["low_rank"],),
    "fine_tune full": (fine_tune.RATES["full"],),
    "lsq": (full_qat.RATES["learned"], full_qat.SCALE_RATE),
    "torchao_qat": (full_qat.RATES["recomputed"],),
    "qad": (full_qat.RATES["frozen"],),
    "block_ap": (block_ap.RATE, block_ap.SCALE_RATE),
}
TRIALS = [json.loads(line) for line in (ROOT / rates.TRIALS).read_text().splitlines()]


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_default_is_the_best_of_the_search(name):
    assert rates.best(name, TRIALS) == DEFAULTS[name]


def test_every_method_of_the_search_has_its_default_checked():
    """Of those that start from another method's codes one stands for all, since the best is over them."""
    assert {e.defaults for e in rates.ENTRIES.values()} == {rates.ENTRIES[name].defaults for name in DEFAULTS}


def test_all_trials_are_on_the_same_texts():
    assert len({trial["texts"] for trial in TRIALS}) == 1


def test_the_best_is_over_all_schemes_and_lengths():
    """0.2 wins a row of 8 steps by more than 0.1 wins the other; with 32 steps 0.1 is ahead. Those of 128 do not count."""
    rows = {("w4-g64", 8): (20, 21), ("w3-g64", 8): (40, 30), ("w4-g64", 32): (18, 26), ("w3-g64", 128): (20, None)}
    done = [
        {"method": "peqa", "scheme": scheme, "steps": steps, "rates": [rate], "perplexity": perplexity, "kl": 0}
        for (scheme, steps), found in rows.items()
        for rate, perplexity in zip((0.1, 0.2), found, strict=True)
        if perplexity
    ]
    assert rates.best("peqa", done) == (0.1,)
    assert rates.candidates("peqa", 32, done) == [(0.2,), (0.1,)]
    assert rates.candidates("peqa", 2, done) == [(0.2,), (0.4,), (0.8,)]


def test_trials_of_an_older_grid_count_until_there_are_others():
    old = {"method": "peqa", "scheme": "w3-g64", "steps": 8, "rates": [0.1], "perplexity": 20}
    new = old | {"rates": [0.2], "perplexity": 30, "kl": 0.1}
    assert rates.best("peqa", [old]) == (0.1,) and rates.best("peqa", [old, new]) == (0.2,)


def test_of_equal_perplexities_the_lower_kl_is_the_best():
    """0.2 has the lowest perplexity and 0.1 is within 1 % of it, nearer to the model; 0.05 is nearest and too far behind."""
    found = {0.05: (20.4, 0.1), 0.1: (20.1, 0.2), 0.2: (20.0, 0.3)}
    done = [
        {"method": "peqa", "scheme": "w3-g64", "steps": 8, "rates": [rate], "perplexity": perplexity, "kl": kl}
        for rate, (perplexity, kl) in found.items()
    ]
    assert rates.ranking("peqa", [8], done) == [(0.1,), (0.2,), (0.05,)]
