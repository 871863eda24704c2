"""Jobs that make the same output do so one after the other, even if one of them has outlived its Snakemake."""

import subprocess
import sys
import time

from methods.core.job.files import ROOT, exclusive

HOLD = "import sys, time; from pathlib import Path; from methods.core.job.files import exclusive\n"
HOLD += "with exclusive(Path(sys.argv[1])): print('in', flush=True); time.sleep(float(sys.argv[2]))"


def start(output, seconds):
    command = [sys.executable, "-c", HOLD, str(output), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_waits_and_says_for_whom(tmp_path):
    output = tmp_path / "a/checkpoint"
    first = start(output, 1.5)
    assert first.stdout.readline() == "in\n"
    second, other = start(output, 0), start(tmp_path / "a/other", 0)
    assert other.communicate(timeout=30)[0] == "in\n" and first.poll() is None  # another output does not wait
    out, err = second.communicate(timeout=30)
    assert first.poll() is not None and out == "in\n"
    assert f"waiting for process {first.pid} on " in err and f"which makes {output}" in err


def test_a_killed_process_leaves_no_lock(tmp_path):
    first = start(tmp_path / "x", 60)
    assert first.stdout.readline() == "in\n"
    first.kill()
    first.wait()
    began = time.monotonic()
    with exclusive(tmp_path / "x"):
        assert time.monotonic() - began < 1
