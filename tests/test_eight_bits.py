"""At 8 bits rounding costs next to nothing, so whatever a training method costs there is a fault of its own: of its rates."""

import subprocess
import sys

import pytest
import torch

from evals.perplexity import token_nll
from methods.core.job import registry, runtime
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.scheme import Scheme
from methods.core.tokens import read_windows, sample_windows

pytestmark = pytest.mark.workflow
STEPS, BATCH, SEQUENCE = 4, 2, 256
# Rows that train: a name, the module, its options.
ROWS = [(name, name, {}) for name in registry.names("methods") if registry.load("methods", name).METHOD.kind == "qat"]
ROWS += [(f"full_qat, {scales}", "full_qat", {"scales": scales}) for scales in ("frozen", "recomputed")]


@pytest.fixture(scope="module", params=["micro", "smollm2-135m"])
def prepared(request, smoke):
    """A model's folder and the folder of its token files."""
    model = f"resources/models/{request.param}"
    tokens = f"resources/tokens/{request.param}"
    targets = [model, f"{tokens}/training.safetensors", f"{tokens}/tuning.safetensors"]
    command = [sys.executable, "-m", "snakemake", "-q", "--cores", "8", "--rerun-triggers", "mtime", "--", *targets]
    subprocess.run(command, cwd=smoke, check=True)
    return smoke / model, smoke / tokens


def test_no_method_at_its_defaults_ends_above_rounding(prepared, tmp_path):
    folder, files = prepared
    runtime.set_up(torch.get_num_threads(), seed=0)  # of one of several test processes, its share
    dtype = runtime.compute_dtype(folder)
    windows = read_windows(files / "tuning.safetensors", SEQUENCE)[0][:8]
    text, _ = sample_windows(files / "training.safetensors", STEPS * BATCH, SEQUENCE, seed=0)
    text = text.unflatten(0, (STEPS, 1, BATCH))

    def perplexity(method, scheme, tokens=None, **options):
        module, log = registry.load("methods", method), RunLog(tmp_path / method / scheme.name)
        model = module.apply(load_model(folder, dtype), scheme, module.Config(**options), tokens, log)
        # Rounded to 8 bits a block is so near its targets that a few steps may not come nearer; it says so and stays.
        assert all("training made it worse" in departure for departure in log.departures)
        return float(token_nll(model, windows, 4, RunLog()).mean().exp())

    # A real model trains for minutes; for it, each module at its defaults is enough.
    rows = [row for row in ROWS if folder.name == "micro" or not row[2]]
    for group_size in (64, None):
        scheme = Scheme.from_dict(f"w8-{group_size}", {"weights": {"bits": 8, "group_size": group_size}})
        rounded = max(perplexity("rtn", scheme), perplexity("rtn", scheme, scale="minmax"))
        trained = {name: perplexity(module, scheme, text, **options) for name, module, options in rows}
        assert max(trained.values()) < 1.01 * rounded, (scheme.name, rounded, trained)
