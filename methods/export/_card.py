"""The model card of an export: what it is, how to load it, what was measured, how it was made, and what to know.

Every number comes from the cell's run.json and result files. Nothing here imports torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods.core.job.files import read_json, sha256_file

# Of `footprint`, what tells one checkpoint from another; of the others, every metric that is not of one task or subject.
FOOTPRINT = ("bits_per_weight", "size_mb")
# In the order of the table.
HEADINGS = {
    "perplexity": "perplexity",
    "kl_mean": "KL from full precision, mean",
    "kl_p99": "KL from full precision, 99th percentile",
    "top1_agreement": "same most likely token as full precision",
    "zero_shot_avg8": "zero-shot average of 8 tasks",
    "zero_shot_avg6": "zero-shot average of 6 tasks",
    "mmlu_0shot": "MMLU, no examples",
    "mmlu_5shot": "MMLU, five examples",
    "bits_per_weight": "bits per weight of the checkpoint",
    "size_mb": "size of the checkpoint",
}


@dataclass(frozen=True)
class Cell:
    """What is known of a checkpoint. `run` is None for a bare one; `reference` are full precision's results."""

    checkpoint: Path
    config: dict[str, Any]
    run: dict[str, Any] | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    reference: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # results of another checkpoint

    @property
    def name(self) -> str:
        """What the export is called."""
        if self.run is None:
            return self.checkpoint.name
        return "-".join(self.run["cell"][key] for key in ("model", "scheme", "method"))


def read_cell(folder: Path) -> Cell:
    """The cell in `folder`, or whose checkpoint that is, or a bare checkpoint. ValueError if it is neither."""
    checkpoint = (folder if (folder / "config.json").is_file() else folder / "checkpoint").resolve()
    if not (checkpoint / "config.json").is_file():
        raise ValueError(
            f"{folder} is neither a cell nor a checkpoint: there is no config.json in it or in its checkpoint/"
        )
    config = read_json(checkpoint / "config.json")
    cell = checkpoint.parent
    if not (cell / "run.json").is_file():
        return Cell(checkpoint, config)
    run = read_json(cell / "run.json")
    results = _read_results(cell)
    ours = {name: r for name, r in results.items() if r["checkpoint_sha256"] == run["checkpoint_sha256"]}
    return Cell(checkpoint, config, run, ours, _read_reference(cell, run), tuple(sorted(results.keys() - ours.keys())))


def _read_results(cell: Path) -> dict[str, dict[str, Any]]:
    """By evaluation, the result files of a cell, but for speeds: those are not of the programs that read an export."""
    found = (read_json(path) for path in sorted((cell / "evals").glob("*.json")) if not path.stem.endswith(".failed"))
    results = {result["evaluation"]: result for result in found if isinstance(result, dict) and "metrics" in result}
    return {name: result for name, result in results.items() if name != "throughput"}


def _read_reference(cell: Path, run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Full precision's results beside the cell: of its seed if there are any, of the very same model in any case."""
    if len(cell.parents) < 3:
        return {}
    others = {path.parent: read_json(path) for path in cell.parents[2].glob("*/*/seed*/run.json")}
    references = [
        (other["cell"]["seed"] != run["cell"]["seed"], folder)
        for folder, other in others.items()
        if other.get("chain", {}).get("kind") == "reference" and other["model"] == run["model"]
    ]
    return _read_results(min(references)[1]) if references else {}


def headlines(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The metrics of a result that a card shows."""
    shown = FOOTPRINT if result["evaluation"] == "footprint" else [n for n in result["metrics"] if "/" not in n]
    return {name: result["metrics"][name] for name in shown if name in result["metrics"]}


def _heading(name: str) -> str:
    """Of a metric in the card's table; `perplexity-c4` is that of another text."""
    plain, _, text = name.partition("-")
    return HEADINGS.get(plain, plain) + (f" ({text})" if text else "")


def write_card(cell: Cell, module, folder: Path, title: str, sha256: str, license: str | None, exported: dict) -> None:
    """README.md of the export in `folder`, made by the format `module` and to be called `title`.

    sha256 is the checkpoint's, `exported` is the provenance of the export itself.
    """
    from huggingface_hub import ModelCard

    sections = [
        f"---\n{_metadata(cell, module, license).to_yaml()}\n---\n",
        f"# {cell.name}\n",
        _summary(cell, module) + "\n",
        "## How to load it\n",
        module.USAGE.replace("{folder}", title),
    ]
    if cell.results:
        sections += ["## What was measured\n", _measured(cell), _reading(cell)]
    sections += ["## How it was made\n", _made(cell, sha256, exported), "## The files\n", _files(folder)]
    sections += ["## What to know\n", _bullets([*module.notes(cell.config), *_caveats(cell)])]
    ModelCard("\n".join(sections)).save(folder / "README.md")


def _metadata(cell: Cell, module, license: str | None):
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result["data"].get("dataset", evaluation),
            dataset_name=result["protocol"],
            dataset_config=evaluation,
            dataset_args={"n": result["n"], "partial": result["partial"]},
            metric_type=name.partition("-")[0],
            metric_name=_heading(name),
            metric_value=entry["value"],
            metric_args={"stderr": entry["stderr"], "unit": entry["unit"]},
        )
        for evaluation, result in cell.results.items()
        for name, entry in headlines(result).items()
    ]
    base = _hub_id(cell)
    known = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    if license:
        known["license"] = license
    return ModelCardData(
        model_name=cell.name,
        library_name="gguf" if "gguf" in module.TAGS else "transformers",
        pipeline_tag="text-generation",
        tags=["ptqat", *module.TAGS],  # not the method: on the Hub, `gptq` is a format
        eval_results=results or None,
        **known,
    )


def _hub_id(cell: Cell) -> str | None:
    """The model on the Hub that was quantized. Only one that came from there has a revision."""
    return cell.run["model"]["spec"]["path"] if cell.run and cell.run["model"].get("revision") else None


def _summary(cell: Cell, module) -> str:
    grids = " and ".join(
        dict.fromkeys(
            f"{g['weights']['num_bits']} bits ({'symmetric' if g['weights']['symmetric'] else 'with zero points'}, "
            + (
                f"a scale per {g['weights']['group_size']} columns"
                if g["weights"]["group_size"]
                else "a scale per channel"
            )
            + ")"
            for g in cell.config["quantization_config"]["config_groups"].values()
        )
    )
    what = f"{cell.config['architectures'][0]}, the linear layers of its decoder blocks quantized to {grids}"
    steps = " then ".join(f"`{step['module']}`" for step in cell.run["steps"]) if cell.run else ""
    how = f" with {steps}" if steps else ""
    return f"{what}{how}. Format: {module.TAGS[0]}."


def _measured(cell: Cell) -> str:
    rows = {}
    for evaluation, result in cell.results.items():
        reference = cell.reference.get(evaluation)
        comparable = reference is not None and reference["protocol"] == result["protocol"]
        for name, entry in headlines(result).items():
            other = headlines(reference).get(name) if comparable else None
            rows[name] = (
                f"| {_heading(name)} | {format_value(entry, result['partial'])} "
                f"| {format_value(other, reference['partial']) if other else ''} | {result['protocol']} |"
            )
    places = {name: place for place, name in enumerate(HEADINGS)}
    order = sorted(rows, key=lambda name: (places.get(name.partition("-")[0], len(places)), name))
    head = ["| | this model | full precision | protocol |", "|---|---|---|---|"]
    return "\n".join([*head, *(rows[name] for name in order)]) + "\n"


def format_value(entry: dict[str, Any], partial: bool) -> str:
    """A metric with its standard error and unit; † if it is of a part of the items."""
    unit = "" if entry["unit"] in ("share", "perplexity") else f" {entry['unit']}"
    error = "" if entry["stderr"] is None else f" ± {entry['stderr']:.2g}"
    return f"{entry['value']:.4g}{error}{unit}{' †' if partial else ''}"


def _reading(cell: Cell) -> str:
    computes = sorted({r["computes"] for r in cell.results.values()})
    lines = [
        "Measured on the checkpoint, whose integers and scales this export holds unchanged. ± is a standard error, over "
        "windows of text or questions; the smaller the difference, the more a paired comparison is needed to tell it.",
        f"Computed in: {'; '.join(computes)}.",
    ]
    if any(r["partial"] for r in cell.results.values()):
        lines.append("† partial: the first windows or some questions only, as the protocol says.")
    return "\n".join(f"{line}\n" for line in lines)


def _made(cell: Cell, sha256: str, exported: dict[str, Any]) -> str:
    lines = []
    if cell.run is not None:
        run, where = cell.run, cell.run["provenance"]
        base = _hub_id(cell)
        revision = f" at `{run['model']['revision']}`" if base else ""
        lines += [
            f"Model: `{base or run['cell']['model']}`{revision}, {run['model']['parameters']:,} parameters, sha256 of its "
            f"weights `{run['model']['sha256']}`",
            f"Recipe: {run['cell']['method']}, seed {run['cell']['seed']}",
            f"Scheme: {run['cell']['scheme']}, `{json.dumps(run['scheme'])}`",
            *(_step(step) for step in run["steps"]),
            f"Took: {run['chain']['seconds']:,.0f} s on {where['device']}, {where['threads']} of {where['cores']} cores",
            f"Made: {where['date']}, commit `{where['git_commit']}`, torch {where['versions']['torch']}, transformers "
            f"{where['versions']['transformers']}",
        ]
    lines += [
        f"sha256 of the checkpoint: `{sha256}`",
        f"Exported: {exported['date']}, commit `{exported['git_commit']}`",
    ]
    return _bullets(line for line in lines if line)


def _step(step: dict[str, Any]) -> str:
    """A step of the recipe: its method and options, and which text it read, and how much of it."""
    text, tokens = f"Step: `{step['module']}`, options `{json.dumps(step['options'])}`", step["tokens"]
    if tokens is None:
        return text
    count = tokens["samples"] * tokens["sequence_length"]
    use = "trained" if step["training"] else "calibrated"
    return (
        f"{text}, {use} on {count:,} tokens of `{tokens['dataset']}` ({tokens['samples']} sequences of "
        f"{tokens['sequence_length']}), sha256 of the text `{tokens.get('text_sha256', 'not recorded')}`"
    )


def _files(folder: Path) -> str:
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    return _bullets(f"`{p.name}`: {p.stat().st_size / 1e6:,.1f} MB, sha256 `{sha256_file(p)}`" for p in paths)


def _caveats(cell: Cell) -> list[str]:
    found = []
    if cell.run is None:
        found.append(
            "There was no run.json beside the checkpoint: how it was made and how good it is, is not known here."
        )
    if cell.left_out:
        found.append(f"Results of another checkpoint were left out: {', '.join(cell.left_out)}.")
    if cell.run and (bits := cell.run["model"].get("gguf_bits_per_weight")):
        found.append(
            f"What was quantized, and what is called full precision here, is a model that had been stored at {bits:g} bits "
            "per weight (GGUF) and was dequantized; how far that is from the original was not measured."
        )
    departures = [
        *(cell.run["departures"] if cell.run else ()),
        *(d for r in cell.results.values() for d in r["departures"]),
    ]
    found += [f"Departure from the plan: {text}." for text in departures]
    return found


def _bullets(lines) -> str:
    return "".join(f"- {line}\n" for line in lines)
