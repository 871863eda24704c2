"""Files say when they are not as they were written; jobs that make the same output do so one after the other, even if one of
them has outlived its Snakemake."""

import fcntl
import json
import subprocess
import sys
import time

import pytest
import torch

from methods.core.job.files import ROOT, exclusive, is_locked, read_json, try_lock, write_json
from methods.core.job.tensors import read_sealed, read_state, write_sealed
from workflow import lock

HOLD = "import sys; from pathlib import Path; from methods.core.job.files import exclusive\n"
HOLD += "with exclusive(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"


def start(output):
    """A process that holds the output's lock until its input ends."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", HOLD, str(output)], cwd=ROOT, text=True, **pipes)


def test_the_second_waits_and_says_for_whom(tmp_path):
    output = tmp_path / "a/checkpoint"
    first = start(output)
    assert first.stdout.readline() == "in\n"
    second, other = start(output), start(tmp_path / "a/other")
    assert other.communicate(timeout=60)[0] == "in\n"  # another output does not wait
    line = second.stderr.readline()
    assert f"waiting for process {first.pid} on " in line and f"which makes {output}" in line
    assert first.poll() is None
    first.communicate(timeout=60)
    assert second.communicate(timeout=60)[0] == "in\n"


def test_a_killed_process_leaves_no_lock(tmp_path):
    first = start(tmp_path / "x")
    assert first.stdout.readline() == "in\n"
    first.kill()
    first.communicate()
    began = time.monotonic()
    with exclusive(tmp_path / "x"):
        assert time.monotonic() - began < 1


@pytest.fixture
def state(tmp_path, monkeypatch):
    """Snakemake's folder, with the locks of a run that was killed."""
    monkeypatch.setattr(lock, "_held", None)
    (tmp_path / "state/locks").mkdir(parents=True)
    (tmp_path / "state/locks/0.input.lock").touch()
    return tmp_path / "state"


def test_locks_of_a_killed_run_are_removed(state):
    lock.start(state, unlock=False)
    assert is_locked(state / lock.FILE) and not (state / "locks").exists()


def test_locks_stay_where_the_file_system_has_none(state, monkeypatch):
    """Then nobody knows whether another run is at work, and Snakemake's own locks are all there is."""

    def unsupported(file, how):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock.start(state, unlock=False)
    assert (state / "locks/0.input.lock").exists() and try_lock(state / lock.FILE)


def test_every_changed_bit_of_a_json_file_is_found(tmp_path):
    path, value = tmp_path / "a.json", {"b": [1, 2.5, None, "ü"], "a": {"c": True, "d": float("nan")}, "e": "x y"}
    write_json(path, value)
    assert repr(read_json(path, sealed=True)) == repr(value)
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :])
            with pytest.raises(ValueError, match=r"a\.json"):
                read_json(path, sealed=True)


def test_json_of_other_programs_has_no_seal(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(ValueError, match="older version, or changed"):
        read_json(tmp_path / "a.json", sealed=True)
    write_json(tmp_path / "b.json", ["a list"])
    assert json.loads((tmp_path / "b.json").read_text()) == ["a list"]


TENSORS = {
    "a": torch.arange(6).view(2, 3).bfloat16(),
    "b": torch.tensor(2.0),
    "c": torch.zeros(0, 4),
    "d": torch.ones(3, dtype=torch.int8),
}


def test_every_changed_byte_of_tensors_is_found(tmp_path, capsys):
    path = tmp_path / "a.safetensors"
    write_sealed(path, TENSORS, {"step": "4"})
    tensors, facts = read_sealed(path)
    assert facts == {"step": "4"} and all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    data = path.read_bytes()
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :])
        try:
            tensors, facts = read_sealed(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # the name of the hash itself, without which there is none, or what nobody reads
            assert all(torch.equal(tensors[name], t) for name, t in TENSORS.items())
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert read_state(path) is None and "done again" in capsys.readouterr().err
    path.unlink()
    assert read_state(path) is None and capsys.readouterr().err == ""
