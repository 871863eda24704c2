"""One step of a recipe, as `python -m methods` plans it."""

import subprocess
import sys

import pytest
import torch

from methods.core.job.files import read_json
from methods.core.job.log import RunLog
from methods.core.model.checkpoint import load_model
from methods.core.step.record import layer_table
from workflow.configuration import ROOT

SCRIPT = """
import sys
from methods.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as error:
    print(error.code)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["gtpq"], "Did you mean 'gptq'?"),
        (["gptq", "--options", "{static_groups: false}"], "act_order with groups needs static_groups"),
        (["gptq"], "method gptq needs calibration tokens: --tokens FILE"),
        (["rtn", "--init-from", "nowhere/checkpoint"], "there is no nowhere/run.json"),
    ],
)
def test_a_mistake_is_refused_before_torch_is_imported(tiny, tmp_path, arguments, error):
    weights = "{weights: {bits: 4, group_size: 32}}"
    command = [sys.executable, "-c", SCRIPT, *arguments, "--model", str(tiny), "--scheme", weights]
    done = subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "1\n", done.stderr
    assert error in read_json(tmp_path / "failed.json")["error"]


def test_the_error_of_a_layer_is_relative_to_its_weight_and_none_for_zeros(tiny, tmp_path):
    original = load_model(tiny, torch.float32)
    changed, zeros = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    original.get_submodule(zeros).weight.data.zero_()
    original.save_pretrained(tmp_path)
    original.get_submodule(changed).weight.data.mul_(1.25)
    rows = layer_table(original, tmp_path, [changed, zeros], RunLog())
    assert [row["weight_error"] for row in rows] == pytest.approx([0.25, 0.0])
