"""Throughput: the packed layers compute the checkpoint's product, and what is reported is what was timed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from evals import throughput
from evals.core import energy, engines, kernels
from methods.core.formats.integer import Integer
from methods.core.job import registry
from methods.core.job.files import ROOT
from methods.core.job.log import RunLog
from methods.core.model import gguf
from methods.core.model.checkpoint import load_model, save_checkpoint
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme

CONFIG = throughput.Config(batch_sizes=(1, 2), prompt=8, new_tokens=4, repeats=3)


def layer(bits, group_size, symmetric=True, out=64, width=256, bias=False, scale_dtype=torch.bfloat16):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(out, width, generator=random)
    grid = Integer(bits, group_size, symmetric, scale_dtype)
    scale, zero_point = choose_scale(weight, grid, ScaleSearch())
    rounded = grid.quantize(weight, scale, zero_point)
    return QuantizedLinear(rounded, torch.randn(out) if bias else None, torch.float32)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, None])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_computes_the_product_of_the_layer(bits, group_size, symmetric):
    exact = layer(bits, group_size, symmetric)
    check(kernels.Int4Linear(exact), exact)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_int8_computes_the_product_of_the_layer(bits):
    exact = layer(bits, None)
    check(kernels.Int8Linear(exact), exact)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_bias_is_added(bits):
    exact = layer(bits, None, bias=True)
    exact.bias = exact.bias.bfloat16().float()
    check((kernels.Int4Linear if bits == 4 else kernels.Int8Linear)(exact), exact)


def check(packed, exact):
    """Equal but for the rounding of bf16: of the output, and of the products on the way."""
    x = torch.randn(3, 5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = exact(x.float())
    assert (packed(x).float() - expected).norm() < 0.008 * expected.norm()
    assert packed.packed.numel() * packed.packed.element_size() * (2 if packed.kind == "int4" else 1) == 64 * 256


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: layer(8, 64), "one scale per channel"),
        (lambda: layer(8, None, symmetric=False), "no zero points"),
        (lambda: layer(4, 16), "groups of 256, 128, 64, 32"),
        (lambda: layer(4, 64, scale_dtype=torch.float32), "int4 has bfloat16 scales, not float32"),
        (lambda: layer(8, None, scale_dtype=torch.float16), "int8 has bfloat16 scales, not float16"),
    ],
)
def test_what_has_no_kernel_says_why(made, reason):
    model = torch.nn.Sequential(made())
    with pytest.raises(kernels.NoKernel, match=reason):
        kernels.pack(model)


def checkpoint(tiny, folder, weights, **tokens):
    from methods.core.model.activations import mark_layers

    scheme = Scheme.from_dict("some", {"weights": weights, **tokens})
    model = load_model(tiny, torch.float32)
    mark_layers(model, scheme)
    rtn = registry.load("methods", "rtn")
    save_checkpoint(rtn.apply(model, scheme, rtn.Config(), None, RunLog()), tiny, folder / "checkpoint")
    return load_model(folder / "checkpoint", torch.float32)


@pytest.mark.parametrize(("bits", "group_size", "kernel"), [(4, 64, "int4"), (3, 64, "int4"), (8, "channel", "int8")])
def test_it_reports_the_medians_of_what_it_timed(tiny, tmp_path, bits, group_size, kernel):
    model = checkpoint(tiny, tmp_path, {"bits": bits, "group_size": group_size})
    model.name_or_path = "elsewhere"  # the folder is an argument
    result = throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, RunLog())
    assert result.data["kernel"] == kernel
    rows = pd.DataFrame(result.items)
    assert len(rows) == result.n == 3 * 2 * 2 * 3  # weights, phases, batch sizes, repeats
    for name, weights, batch in [
        ("decode_tokens_per_second", "packed", 1),
        ("decode_tokens_per_second/batch2", "packed", 2),
        ("prefill_tokens_per_second/float32/batch2", "float32", 2),
    ]:
        phase = name.partition("_")[0]
        own = rows[(rows.weights == weights) & (rows.phase == phase) & (rows.batch == batch)]
        assert (own.tokens == batch * (4 if phase == "decode" else 8)).all()
        assert result.metrics[name]["value"] == pytest.approx((own.tokens / own.seconds).median())
    assert 0 < result.metrics["logit_error"]["value"] < 0.05


def test_the_bytes_that_a_step_reads(tiny, tmp_path):
    """Packed 4-bit codes and bf16 scale and zero per group; norms and the tied head in bf16."""
    model = checkpoint(tiny, tmp_path, {"bits": 4, "group_size": 64})
    metrics = throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, RunLog()).metrics
    linear = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 192 * 64)
    other = 256 * 64 + 5 * 64
    rotary = 4 * 16  # fp32 frequencies of half the 16 columns of a head, and a copy of them
    assert metrics["weights_mb"]["value"] == pytest.approx((linear * (0.5 + 4 / 64) + 2 * other + rotary) / 1e6)
    assert metrics["weights_mb/bfloat16"]["value"] == pytest.approx((2 * (linear + other) + rotary) / 1e6)
    assert metrics["weights_mb/float32"]["value"] == pytest.approx((4 * (linear + other) + rotary) / 1e6)


@pytest.mark.parametrize(
    ("weights", "tokens", "reason"),
    [
        ({"bits": 8, "group_size": 64}, {}, "8 bits, groups of 64"),
        ({"bits": 4, "group_size": 64}, {"activations": {"bits": 8}}, "quantizes activations"),
    ],
)
def test_without_a_kernel_there_is_no_number_but_a_reason(tiny, tmp_path, weights, tokens, reason):
    log = RunLog()
    model = checkpoint(tiny, tmp_path, weights, **tokens)
    result = throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, log)
    assert result.data["kernel"] is None
    assert reason in result.data["no_kernel"]
    assert reason in log.departures[0]
    assert "decode_tokens_per_second" not in result.metrics
    assert "decode_tokens_per_second/bfloat16" in result.metrics


def test_full_precision_is_timed_in_16_bits(tiny):
    result = throughput.evaluate(load_model(tiny, torch.float32), tiny, CONFIG, None, RunLog())
    assert set(pd.DataFrame(result.items).weights) == {"bfloat16", "float32"}
    assert "decode_tokens_per_second" in result.metrics
    assert "logit_error" not in result.metrics


def dense(llama, folder):
    return llama(tie_word_embeddings=True)


def quantized(bits, group_size):
    def make(llama, folder):
        checkpoint(llama(), folder, {"bits": bits, "group_size": group_size})
        return folder / "checkpoint"

    return make


@pytest.mark.parametrize(("made", "types"), [(dense, "BF16"), (quantized(4, 32), "Q4_0, BF16")])
def test_llama_cpp_computes_the_checkpoint(llama, tmp_path, made, types):
    """Each sequence of a batch by itself, step by step; its weights are those of the file but for an untied embedding."""
    pytest.importorskip("llama_cpp")
    from gguf import GGUFReader

    source = made(llama, tmp_path)
    file = engines.export_for_llama_cpp(source, tmp_path)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    ids = torch.randint(380, (3, 40), generator=torch.Generator().manual_seed(0))
    exact = engines.Torch(load_model(source, torch.float32), torch.float32)
    with closing(engines.LlamaCpp(file, 3, 48, 1)) as program:
        assert program.types == types and program.itemsize == (2 if made is dense else 1)
        assert program.bytes_read == sum(sizes.values()) - (0 if made is dense else sizes["token_embd.weight"])
        for sequence in ids:
            for found, expected in zip(program.logits(sequence[None]), exact.logits(sequence[None]), strict=True):
                assert (found - expected).norm() < 0.03 * expected.norm()
        together, alone = greedy(program, ids), torch.cat([greedy(program, sequence[None]) for sequence in ids])
    for chosen in (alone, greedy(exact, ids)):
        assert (together == chosen).sum() >= 2  # of three; after five steps of a random model one may be another


def greedy(engine, ids):
    engine.prefill(ids)
    return engine.decode(5)


@pytest.mark.parametrize(("made", "kernel"), [(dense, None), (quantized(4, 32), "int4"), (quantized(8, 32), None)])
def test_llama_cpp_is_timed_beside_the_kernels(llama, tmp_path, made, kernel):
    """Of 8 bits in groups there is no kernel of PyTorch's, but a type of GGUF."""
    pytest.importorskip("llama_cpp")
    source = made(llama, tmp_path)
    result = throughput.evaluate(load_model(source, torch.float32), source, CONFIG, None, RunLog())
    assert result.data["kernel"] == kernel and result.data["no_llama_cpp"] is None
    rows = pd.DataFrame(result.items)
    own = rows[(rows.weights == "llama.cpp") & (rows.phase == "decode") & (rows.batch == 2)]
    assert (own.tokens == 2 * CONFIG.new_tokens).all() and len(own) == CONFIG.repeats
    speed = result.metrics["decode_tokens_per_second/llama.cpp/batch2"]["value"]
    assert speed == pytest.approx((own.tokens / own.seconds).median())
    assert 0 < result.metrics["logit_error/llama.cpp"]["value"] < 0.05


def test_llama_cpp_is_not_timed_on_other_weights(llama, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    source = quantized(4, 32)(llama, tmp_path)
    other = dense(llama, tmp_path)
    monkeypatch.setattr(engines.gguf, "write", lambda checkpoint, *rest, write=gguf.write: write(other, *rest))
    with pytest.raises(ValueError, match="the logits of llama.cpp are off by"):
        throughput.evaluate(load_model(source, torch.float32), source, CONFIG, None, RunLog())


def test_llama_cpps_own_reason_is_told(tiny, tmp_path):
    """The tokenizer of bytes is one that it does not read."""
    pytest.importorskip("llama_cpp")
    file = engines.export_for_llama_cpp(tiny, tmp_path)
    with pytest.raises(kernels.NoKernel, match="could not load the export: .*vocabulary"):
        engines.LlamaCpp(file, 1, 16, 1)


PARENT = """
import sys
from pathlib import Path
from evals.core.engines import LlamaCpp
if __name__ == "__main__":
    program = LlamaCpp(Path(sys.argv[1]), 1, 64, 1)
    print(next(iter(program.pool._processes)), flush=True)
    sys.stdin.read()
"""


def test_llama_cpp_ends_when_its_parent_is_killed(llama, tmp_path):
    pytest.importorskip("llama_cpp")
    file = engines.export_for_llama_cpp(dense(llama, tmp_path), tmp_path)
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen(
        [sys.executable, script, file],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it is there
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it outlived its parent by ten seconds")


def test_a_llama_cpp_that_is_killed_fails_the_evaluation(llama, tmp_path):
    pytest.importorskip("llama_cpp")
    file = engines.export_for_llama_cpp(dense(llama, tmp_path), tmp_path)
    with closing(engines.LlamaCpp(file, 1, 64, 1)) as program:
        os.kill(next(iter(program.pool._processes)), signal.SIGKILL)
        with pytest.raises(RuntimeError, match="may have been killed for its memory"):
            program.prefill(torch.zeros(1, 4, dtype=torch.long))


def test_without_llama_cpp_the_kernels_are_timed_alone(tiny, monkeypatch):
    monkeypatch.setattr(throughput, "version_of", lambda package: None)
    result = throughput.evaluate(load_model(tiny, torch.float32), tiny, CONFIG, None, RunLog())
    assert not any("llama.cpp" in name for name in result.metrics)
    assert result.data["no_llama_cpp"] == "llama-cpp-python is not installed"


def test_kernels_that_compute_something_else_are_not_timed(tiny, tmp_path, monkeypatch):
    model = checkpoint(tiny, tmp_path, {"bits": 4, "group_size": 64})
    forward = kernels.Int4Linear.forward
    monkeypatch.setattr(kernels.Int4Linear, "forward", lambda self, x: 1.1 * forward(self, x))
    with pytest.raises(ValueError, match="logits of packed are off by"):
        throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, RunLog())


def test_the_energy_of_a_token_is_called_an_estimate_where_it_is_one(tiny, tmp_path):
    """13.7 thousand weights: so many multiply-adds at 1.5 pJ, and their bytes at 162.5 pJ."""
    model = checkpoint(tiny, tmp_path, {"bits": 4, "group_size": 64})
    metrics = throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, RunLog()).metrics
    if "decode_joules_per_token" in metrics:
        pytest.skip("this machine has counters")
    macs = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 192 * 64) + 256 * 64
    for suffix, itemsize in (("", 2), ("/bfloat16", 2), ("/float32", 4)):
        bytes_read = 1e6 * metrics[f"weights_mb{suffix}"]["value"]
        expected = (162.5 * bytes_read + {2: 1.5, 4: 4.6}[itemsize] * macs) * 1e-12
        assert metrics[f"decode_joules_per_token_estimate{suffix}"]["value"] == pytest.approx(expected)


class Counters:
    """What Zeus returns on a machine with counters; this one has none."""

    def __init__(self, **joules):
        self.joules, self.open = joules, False

    def begin_window(self, name):
        self.open = True

    def end_window(self, name):
        self.open = False
        return SimpleNamespace(**{"gpu_energy": {}, "cpu_energy": None, "dram_energy": None} | self.joules)


def test_joules_are_those_of_all_counters(monkeypatch):
    counters = Counters(gpu_energy={0: 1.5, 1: 2.0}, cpu_energy={0: 3.0}, dram_energy={0: 0.25})
    monkeypatch.setattr(energy, "_monitor", lambda: counters)
    with energy.measured() as joules:
        assert counters.open
    assert joules() == 6.75 and not counters.open


@pytest.mark.parametrize(("counters", "expected"), [(None, None), (Counters(cpu_energy={0: 0.0}), 0)])
def test_without_counters_nothing_is_measured(monkeypatch, counters, expected):
    monkeypatch.setattr(energy, "_monitor", lambda: counters)
    with energy.measured() as joules:
        pass
    assert joules() == expected


def test_joules_of_a_counter_that_moves_now_and_then_are_spread_over_all_tokens(tiny):
    """10 J in three repeats of 4 tokens: a counter that stood still in two of them did not measure 2.5 J a token."""
    row = {"weights": "packed", "phase": "decode", "batch": 1, "tokens": 4}
    rows = [row | {"joules": joules} for joules in (0, 0, 10)]
    engine = engines.Torch(load_model(tiny, torch.bfloat16), torch.bfloat16)
    found = throughput._energy(rows, engine, 1, 100, "")
    assert found["decode_joules_per_token"]["value"] == 10 / 12
    still = throughput._energy(rows[:2], engine, 1, 100, "")
    assert list(still) == ["decode_joules_per_token_estimate"]


def test_measured_joules_have_their_own_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_monitor", lambda: Counters(cpu_energy={0: 2.0}))
    model = checkpoint(tiny, tmp_path, {"bits": 4, "group_size": 64})
    metrics = throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, RunLog()).metrics
    assert not any("estimate" in name for name in metrics)
    tokens = CONFIG.new_tokens
    assert metrics["decode_joules_per_token"]["value"] == 2 / tokens
    assert metrics["decode_joules_per_token/float32/batch2"]["value"] == 1 / tokens


@pytest.mark.parametrize("batch_sizes", [(4, 1), (1, 1), (0, 1)])
def test_batch_sizes_ascend(batch_sizes):
    with pytest.raises(ValueError, match="positive and ascending"):
        throughput.Config(batch_sizes=batch_sizes)


def test_a_sequence_longer_than_the_context_is_an_error(tiny):
    with pytest.raises(ValueError, match="prompt and new_tokens is .* longer than the model's context"):
        throughput.evaluate(load_model(tiny, torch.float32), tiny, throughput.Config(prompt=10**6), None, RunLog())


def test_out_of_memory_is_no_missing_kernel(tiny, tmp_path, monkeypatch):
    model = checkpoint(tiny, tmp_path, {"bits": 4, "group_size": 64})

    def full(self, x):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(kernels.Int4Linear, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        throughput.evaluate(model, tmp_path / "checkpoint", CONFIG, None, RunLog())
