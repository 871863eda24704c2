"""The command that evaluates a checkpoint: one process, a file per evaluation, what is kept and what a failure leaves."""

import json
import shutil

import jsonschema
import pytest
import torch
import transformers
import yaml

from evals import footprint, metric
from evals.__main__ import check, main
from evals.core.reference import reference, write_reference
from methods.core.job import runtime
from methods.core.job.files import read_json, sha256_file, write_json
from methods.core.job.log import RunLog
from methods.core.model import checkpoint
from methods.core.model.activations import mark_layers
from methods.core.model.anatomy import block_linears, replace_module
from methods.core.model.checkpoint import load_model, save_checkpoint
from methods.core.model.layers import QuantizedLinear
from methods.core.scales import ScaleSearch, choose_scale
from methods.core.scheme import Scheme
from methods.core.tokens import write_tokens
from tests.conftest import described, flip
from workflow.configuration import ROOT


@pytest.fixture
def stream(tmp_path):
    ids = torch.randint(0, 256, (330,), generator=torch.Generator().manual_seed(1))
    write_tokens(tmp_path / "t.safetensors", ids, {"dataset": "noise", "text_sha256": "f" * 64})
    return str(tmp_path / "t.safetensors")


def evaluate(evaluations, checkpoint, output):
    main([json.dumps(evaluations), "--checkpoint", str(checkpoint), "--output", str(output), "--threads", "1"])


def test_each_result_is_complete_by_itself(tiny, stream, tmp_path):
    evaluate({"perplexity": {"data": stream, "options": {"window": 32}}, "footprint": {}}, tiny, tmp_path / "e")
    schema = yaml.safe_load((ROOT / "workflow/schemas/result.schema.yaml").read_text())
    for name in ("perplexity", "footprint"):
        jsonschema.validate(json.loads((tmp_path / f"e/{name}.json").read_text()), schema)
    assert (tmp_path / "e/perplexity.parquet").is_file() and not (tmp_path / "e/footprint.parquet").exists()
    assert json.loads((tmp_path / "e/done.json").read_text()) == ["footprint", "perplexity"]


def test_a_text_more_is_an_evaluation_of_its_own(tiny, stream, tmp_path):
    ids = torch.randint(0, 256, (330,), generator=torch.Generator().manual_seed(2))
    write_tokens(tmp_path / "u.safetensors", ids, {"dataset": "hiss", "text_sha256": "e" * 64})
    another = str(tmp_path / "u.safetensors")
    asked = {"perplexity": {"data": stream, "options": {"window": 32}}}
    asked["perplexity-hiss"] = {"data": another, "options": {"window": 64}}
    evaluate(asked, tiny, tmp_path / "e")
    evaluate({"perplexity": asked["perplexity-hiss"]}, tiny, tmp_path / "alone")
    results = {
        name: read_json(tmp_path / f"{name}.json") for name in ("e/perplexity", "e/perplexity-hiss", "alone/perplexity")
    }
    (alone,) = results["alone/perplexity"]["metrics"].values()
    assert results["e/perplexity-hiss"]["metrics"] == {"perplexity-hiss": alone}
    assert (
        results["e/perplexity-hiss"]["protocol"]
        == results["alone/perplexity"]["protocol"]
        != results["e/perplexity"]["protocol"]
    )
    assert results["e/perplexity-hiss"]["code_sha256"] == results["e/perplexity"]["code_sha256"]
    assert list(results["e/perplexity"]["metrics"]) == ["perplexity"]


def test_each_is_computed_in_the_dtype_it_needs_by_one_model_at_a_time(tiny, stream, tmp_path, monkeypatch):
    """Divergence in float32, whatever the machine computes the model in; the others share the one that they need."""
    model = load_model(tiny, torch.float32)
    windows = torch.randint(0, 256, (3, 32), generator=torch.Generator().manual_seed(3))
    options = {"window": 32, "max_windows": None, "dtype": "float32"}
    info = {"dataset": "noise", "text_sha256": "f" * 64, "windows": 3, "options": options, "kl_floor": 0.0}
    tensors = reference(model, windows, RunLog()) | {"input_ids": windows.int()}
    write_reference(tmp_path / "r.safetensors", tensors, info)
    loaded = []

    def noting(folder, dtype):
        loaded.append(dtype)
        return load_model(folder, dtype)

    monkeypatch.setattr(checkpoint, "load_model", noting)
    monkeypatch.setattr(runtime, "compute_dtype", lambda folder: torch.bfloat16)
    asked = {
        "divergence": {"data": str(tmp_path / "r.safetensors"), "options": {"window": 32}},
        "perplexity": {"data": stream, "options": {"window": 32}},
        "footprint": {},
    }
    evaluate(asked, tiny, tmp_path / "e")
    results = {name: json.loads((tmp_path / f"e/{name}.json").read_text()) for name in asked}
    dtypes = {name: result["compute_dtype"] for name, result in results.items()}
    assert dtypes == {"divergence": "float32", "perplexity": "bfloat16", "footprint": "bfloat16"}
    assert loaded == [torch.bfloat16, torch.float32]
    assert results["divergence"]["computes"].startswith("torch.float32, ")
    assert results["divergence"]["metrics"]["kl_mean"]["value"] == 0
    evaluate(asked, tiny, tmp_path / "e")
    assert len(loaded) == 2  # all are current


def test_divergence_in_the_machines_dtype(stream, tmp_path):
    """For a model that is too large for float32."""
    for asked, dtype in ((None, torch.float32), ("float32", torch.float32), ("compute", torch.bfloat16)):
        options = {"dtype": asked} if asked else {}
        assert check("divergence", {"data": stream, "options": options}, tmp_path).dtype(torch.bfloat16) == dtype
    assert check("perplexity", {"data": stream}, tmp_path).dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype"):
        check("divergence", {"data": stream, "options": {"dtype": "float16"}}, tmp_path)


@pytest.mark.parametrize("change", ["nothing", "another", "options", "data", "checkpoint", "code_sha256", "computes"])
def test_only_what_changed_is_evaluated_again(tiny, stream, tmp_path, change):
    checkpoint, output = tmp_path / "c", tmp_path / "e"
    shutil.copytree(tiny, checkpoint)
    asked = {"perplexity": {"data": stream, "options": {"window": 32}}}
    evaluate(asked, checkpoint, output)
    first = (output / "perplexity.json").stat().st_mtime_ns
    if change == "another":
        asked["footprint"] = {}
    elif change == "options":
        asked["perplexity"]["options"]["window"] = 64
    elif change == "data":
        write_tokens(stream, torch.arange(330) % 256, {"dataset": "noise", "text_sha256": "e" * 64})
    elif change == "checkpoint":
        config = json.loads((checkpoint / "config.json").read_text())
        (checkpoint / "config.json").write_text(json.dumps(config | {"note": "changed"}))
        described(checkpoint)
    elif change in ("code_sha256", "computes"):
        write_json(output / "perplexity.json", read_json(output / "perplexity.json") | {change: "older"})
        first = (output / "perplexity.json").stat().st_mtime_ns
    evaluate(asked, checkpoint, output)
    kept = (output / "perplexity.json").stat().st_mtime_ns == first
    assert kept == (change in ("nothing", "another")) and (output / "footprint.json").exists() == (change == "another")


@pytest.mark.parametrize("name", ["perplexity.json", "perplexity.parquet"])
def test_a_result_that_was_damaged_is_made_again(tiny, stream, tmp_path, name):
    asked = {"perplexity": {"data": stream, "options": {"window": 32}}}
    evaluate(asked, tiny, tmp_path)
    metrics = read_json(tmp_path / "perplexity.json")["metrics"]
    flip(tmp_path / name)
    evaluate(asked, tiny, tmp_path)
    result = read_json(tmp_path / "perplexity.json", sealed=True)
    assert result["metrics"] == metrics and result["items_sha256"] == sha256_file(tmp_path / "perplexity.parquet")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_that_was_damaged_is_not_evaluated(tiny, stream, tmp_path, name, capsys):
    """And what there is of it stays."""
    shutil.copytree(tiny, tmp_path / "c")
    asked = {"perplexity": {"data": stream, "options": {"window": 32}}}
    evaluate(asked, tmp_path / "c", tmp_path / "e")
    before = (tmp_path / "e/perplexity.json").read_bytes()
    flip(tmp_path / "c" / name)
    with pytest.raises(SystemExit, match=r"c has been changed or damaged: its hash is not that in .*manifest\.json"):
        evaluate(asked, tmp_path / "c", tmp_path / "e")
    assert (tmp_path / "e/perplexity.json").read_bytes() == before


def test_one_that_fails_leaves_the_others(tiny, stream, tmp_path):
    asked = {"perplexity": {"data": stream, "options": {"window": 32}}, "footprint": {}}
    evaluate(asked, tiny, tmp_path)
    (tmp_path / "done.json").unlink()
    asked["perplexity"]["options"]["window"] = 512
    with pytest.raises(SystemExit, match="1"):
        evaluate(asked, tiny, tmp_path)
    failed = json.loads((tmp_path / "perplexity.failed.json").read_text())
    assert not (tmp_path / "perplexity.json").exists()
    assert "longer than the model's context of 256" in failed["error"]
    assert (tmp_path / "footprint.json").is_file() and not (tmp_path / "done.json").exists()
    asked["perplexity"]["options"]["window"] = 32
    evaluate(asked, tiny, tmp_path)
    assert (tmp_path / "done.json").is_file() and not (tmp_path / "perplexity.failed.json").exists()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"perplexty": {}}, "unknown evaluation 'perplexty'.*perplexity"),
        ({"perplexity": {}}, "perplexity needs data: tokens"),
        ({"footprint": {"data": "x"}}, "footprint takes no data"),
        ({"footprint-two": {}}, "'footprint-two': NAME-LABEL .*NAME is divergence or perplexity"),
        ({"perplexity-": {}}, "'perplexity-': NAME-LABEL"),
        ({"perplexity-x.failed": {}}, "'perplexity-x.failed': NAME-LABEL"),
        ({"zero-shot": {}}, "unknown evaluation 'zero-shot'.*'zero_shot'"),
        ({"perplexity": {"data": "no/such"}}, "there is no no/such"),
        ({"perplexity": {"tokens": "x"}}, "unknown key of evaluation perplexity 'tokens'"),
        ({"mmlu": {"data": ["x"], "options": {"shots": [9]}}}, "shots has 9"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tmp_path, entry, message):
    with pytest.raises(SystemExit, match=message):
        evaluate(entry, tmp_path / "no checkpoint", tmp_path)


def test_a_metric_says_how_its_items_are_paired():
    facts = {"higher_is_better": False, "unit": "nats"}
    assert metric(1, **facts) == {"value": 1.0, "stderr": None, **facts}
    assert metric(1, over=["piqa"], **facts)["over"] == ["piqa"]
    pairing = {"column": "nll", "change": "relative"}
    assert metric(1, items=pairing, **facts)["items"] == pairing
    with pytest.raises(ValueError, match="unknown change of a metric 'ratio'; valid: difference, relative"):
        metric(1, items=pairing | {"change": "ratio"}, **facts)
    with pytest.raises(ValueError, match="it has the keys column and change"):
        metric(1, items={"column": "nll"}, **facts)


def test_footprint(tiny, tmp_path):
    metrics = {}
    for name, kv in (("full", None), ("w4", None), ("w4kv4", {"bits": 4})):
        model = load_model(tiny, torch.float32)
        if name != "full":
            weights = {"weights": {"bits": 4, "group_size": 32}}
            scheme = Scheme.from_dict("s", weights | ({"kv_cache": kv} if kv else {}))
            mark_layers(model, scheme)
            for layer, linear in block_linears(model).items():
                grid = scheme.number_format(layer, linear.in_features)
                scale, zero_point = choose_scale(linear.weight.detach().float(), grid, ScaleSearch("minmax"))
                replace_module(
                    model,
                    layer,
                    QuantizedLinear.replacing(linear, grid.quantize(linear.weight.detach(), scale, zero_point)),
                )
        save_checkpoint(model, tiny, tmp_path / name)
        loaded = load_model(tmp_path / name, torch.float32)
        loaded.name_or_path = "elsewhere"  # the folder is an argument
        found = footprint.evaluate(loaded, tmp_path / name, footprint.Config(), None, RunLog()).metrics
        metrics[name] = {key: value["value"] for key, value in found.items()}
    # Two blocks: q and o 64 x 64, k and v 32 x 64, three of the MLP 64 x 192; embeddings 256 x 64, five norms of 64.
    quantizable, other = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192), 256 * 64 + 5 * 64
    assert metrics["full"]["bits_per_weight"] == 16 and metrics["full"]["quantized_parameters"] == 0
    assert metrics["full"]["unquantized_parameters"] == quantizable + other
    assert metrics["w4"]["bits_per_weight"] == pytest.approx(4 + 16 / 32)
    assert (metrics["w4"]["quantized_parameters"], metrics["w4"]["unquantized_parameters"]) == (quantizable, other)
    # Keys and values, two blocks, 32 wide: in bfloat16, or 4 bits and a two-byte scale each.
    assert metrics["full"]["kv_cache_bytes"] == metrics["w4"]["kv_cache_bytes"] == 2 * 2 * 32 * 2
    assert metrics["w4kv4"]["kv_cache_bytes"] == 2 * 2 * (32 / 2 + 2)
    assert metrics["w4"]["size_mb"] < metrics["full"]["size_mb"] < 0.3


def test_bits_per_weight_are_of_all_block_matrices(tmp_path):
    """The routers of a mixture of experts stay in 16 bits."""
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", torch.float32)
    for name, linear in block_linears(model).items():
        scheme = Scheme.from_dict("s", {"weights": {"bits": 4, "group_size": 64}})
        grid = scheme.number_format(name, linear.in_features)
        scale, zero_point = choose_scale(linear.weight.detach().float(), grid, ScaleSearch("minmax"))
        replace_module(
            model, name, QuantizedLinear.replacing(linear, grid.quantize(linear.weight.detach(), scale, zero_point))
        )
    save_checkpoint(model, tmp_path / "m", tmp_path / "c")
    quantized, routers = 2 * 4 * 64 * 64 + 2 * 8 * 3 * 64 * 512, 2 * 8 * 64
    loaded = load_model(tmp_path / "c", torch.float32)
    found = footprint.evaluate(loaded, tmp_path / "c", footprint.Config(), None, RunLog()).metrics
    expected = (quantized * 4.25 + routers * 16) / (quantized + routers)
    assert found["bits_per_weight"]["value"] == pytest.approx(expected) and expected > 4.25
    assert found["quantized_parameters"]["value"] == quantized
    assert found["unquantized_parameters"]["value"] == model.num_parameters()
