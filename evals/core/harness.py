"""lm-eval's tasks on local items: its prompts, choices and metrics, our scoring.

Items are Parquet files that workflow/prepare/tasks.py wrote. A task is lm-eval's own definition, unchanged but for where
its items come from; what is asked of the model is computed with shared prefixes (evals/core/prefix.py), and what the
answers mean is left to the task again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

import datasets
import numpy as np
import pyarrow.parquet as pq
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM, _add_special_kwargs, has_bos_prefix
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import env

from evals.core.prefix import log_likelihoods
from methods.core.job.files import read_json
from methods.core.statistics import mean_and_stderr
from methods.core.tokens import added_bos

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")
REQUESTS = 20_000  # scored at a time, a progress bar each: a few hundred megabytes of token ids
STRINGS = 1_000  # tokenized at a time

# lm-eval compiles a task's template anew for each text it renders, which took most of a minute for MMLU with examples.
env.from_string = cache(env.from_string)


@dataclass(frozen=True)
class Scored:
    """What a model did on the items of one task."""

    name: str
    version: str
    sha256: str  # of the scored items' file
    tags: list[str]
    total: int  # items of the task; as many as there are scores if none was left out
    item: list[int]  # row of each scored item in the task's file
    scores: dict[str, list[float]]  # metric -> one value per item
    log_likelihoods: list[list[float]]  # per item, of its choices
    truncated: int  # items with a request longer than the model's context, cut on the left as lm-eval does
    bos: bool  # whether requests begin with a BOS token

    def mean(self, metric: str) -> tuple[float, float | None]:
        """The metric over the items and its standard error."""
        return mean_and_stderr(np.asarray(self.scores[metric]))


class LocalTask(ConfigurableTask):
    """lm-eval's task whose splits are given instead of downloaded."""

    def __init__(self, config: dict[str, Any], splits: dict[str, datasets.Dataset]):
        self.splits = splits
        super().__init__(config=config)

    def download(self, dataset_kwargs=None, **kwargs) -> None:
        self.dataset = self.splits


@dataclass
class Item:
    """One question: its document and the requests (context, continuation) it makes."""

    row: int
    doc: dict[str, Any]
    requests: list[Any]
    answers: list[tuple[float, bool]] = field(default_factory=list)
    truncated: bool = False


class PrefixSharingLM(HFLM):
    """lm-eval's model class for Hugging Face models, its log-likelihoods computed with shared prefixes.

    Everything about tokens is inherited: how context and continuation are divided, the BOS token, which is there if the
    tokenizer adds one, and what is cut on the left when a request is longer than the model's context, but for the BOS token.
    """

    def __init__(self, model, tokenizer, log):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        self.log = log
        self.bos = added_bos(tokenizer)
        self.encoded: dict[str, list[int]] = {}
        self.truncated: list[bool] = []

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would give it) of each request's continuation."""
        # Many strings in one call are tokenized on all cores, and of a set of them a context only once, not once a choice.
        strings = {part for r in requests for part in _encoded_parts(*r.args)}
        start = self.tokenizer.decode(self.prefix_token_id)
        strings = [s for s in strings if s and not has_bos_prefix(s, start)]
        kwargs = _add_special_kwargs(None, self.add_bos_token)
        for i in range(0, len(strings), STRINGS):
            part = strings[i : i + STRINGS]
            ids = self.tokenizer(part, return_attention_mask=False, **kwargs)["input_ids"]
            self.encoded |= zip(part, ids, strict=True)
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self.encoded = {}

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs) -> list[int]:
        if add_special_tokens is None and left_truncate_len is None and string in self.encoded:
            return self.encoded[string]
        return super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None) -> list[tuple[float, bool]]:
        longest = self.max_length + 1  # the last token is scored, but not read
        pairs, self.truncated = [], []
        for _, context, continuation in requests:
            whole = context + continuation
            self.truncated.append(len(whole) > longest)
            if self.truncated[-1]:
                start = [] if self.bos is None else [self.bos]
                whole = start + whole[len(start) - longest :]
            pairs.append((whole[: -len(continuation)], continuation))
        return log_likelihoods(self.model, pairs, self.log)


def _encoded_parts(context: str, continuation: str) -> tuple[str, str]:
    """The strings that lm-eval encodes for a request: spaces at the end of the context go to the continuation."""
    return context.rstrip(), context + continuation


def score_tasks(model, folders: list[Path], shots: int, limit: int | None, seed: int, log) -> list[Scored]:
    """Score the tasks in `folders`, at most `limit` items of each, drawn by `seed` and the task's name alone.

    ValueError for a folder without tasks, a task that is not multiple choice or log-likelihood, and for an item that the
    task's definition cannot make requests of.
    """
    from transformers import AutoTokenizer

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    found = [path for folder in folders for path in sorted(folder.glob("**/task.json"))]
    if empty := [str(folder) for folder in folders if not any(p.is_relative_to(folder) for p in found)]:
        raise ValueError(f"no tasks in {', '.join(empty)}: python -m workflow.prepare.tasks makes such a folder")
    tasks = [load_task(path.parent, shots, limit, seed) for path in found]
    log.info(f"{sum(len(items) for *_, items in tasks):,} items of {len(tasks)} tasks, {shots}-shot")
    lm = PrefixSharingLM(model, AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True), log)
    asked = [(item, request) for *_, items in tasks for item in items for request in item.requests]
    for i in range(0, len(asked), REQUESTS):
        part = asked[i : i + REQUESTS]
        answers = lm.loglikelihood([request for _, request in part], disable_tqdm=True)
        for (item, _), answer, truncated in zip(part, answers, lm.truncated, strict=True):
            item.answers.append(answer)
            item.truncated |= truncated
    return [_collect(*task, bos=lm.bos is not None) for task in tasks]


def load_task(
    folder: Path, shots: int, limit: int | None, seed: int
) -> tuple[LocalTask, dict[str, Any], int, list[Item]]:
    """The task in a folder, what `task.json` says about it, how many items it has, and those that are scored."""
    import lm_eval.tasks

    about = read_json(folder / "task.json")
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / about["definition"])
    config = {k: v for k, v in config.items() if k not in ("tag", "group")}
    scored = config.get("test_split") or config["validation_split"]
    tables = {split: pq.read_table(folder / f"{split}.parquet") for split in about["splits"]}
    for split in ("training_split", "validation_split", "test_split"):
        if config.get(split) not in tables:
            config[split] = None  # neither scored nor a source of examples
    total = len(tables[scored])
    rows = chosen_rows(about["task"], total, limit, seed)
    tables[scored] = tables[scored].take(rows)
    try:
        task = LocalTask(config | {"num_fewshot": shots}, {s: datasets.Dataset(t) for s, t in tables.items()})
    except Exception as error:
        raise ValueError(f"task {about['task']}: {type(error).__name__}: {error}") from error
    if task.OUTPUT_TYPE not in OUTPUT_TYPES or "acc" not in task.aggregation():
        kind = f"{task.OUTPUT_TYPE} with {', '.join(task.aggregation())}"
        raise ValueError(f"task {about['task']} is {kind}; scored here are {' and '.join(OUTPUT_TYPES)} with acc")
    task.set_fewshot_seed(seed)
    items = [_item(task, doc, int(row)) for doc, row in zip(task.task_docs, rows, strict=True)]
    return task, about, total, items


def chosen_rows(task: str, total: int, limit: int | None, seed: int) -> np.ndarray:
    """Which of a task's items are scored: the same for every checkpoint."""
    if limit is None or limit >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng([seed, crc32(task.encode())]).choice(total, limit, replace=False))


def _item(task: LocalTask, doc: dict[str, Any], row: int) -> Item:
    """The requests of one document. ValueError with its row if the definition cannot make them of it."""
    where = f"task {task.config.task}, item {row}"
    if empty := [name for name in _fields_read(task, doc) if doc[name] is None]:
        raise ValueError(f"{where}: no {empty[0]}")
    try:
        context = task.fewshot_context(doc, num_fewshot=task.config.num_fewshot, gen_prefix=task.doc_to_prefix(doc))
        made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, row, 1))
        choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else [task.doc_to_target(doc)]
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    except Exception as error:
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    if not choices or any(not str(choice).strip() for choice in choices):
        raise ValueError(f"{where}: an empty choice")
    for answer in gold if isinstance(gold, list) else [gold]:
        if task.OUTPUT_TYPE == "multiple_choice" and answer not in choices and answer not in range(len(choices)):
            raise ValueError(f"{where}: the answer {answer!r} is none of its {len(choices)} choices")
    return Item(row, doc, made if isinstance(made, list) else [made])


def _fields_read(task: LocalTask, doc: dict[str, Any]) -> list[str]:
    """The fields of a document that its prompt, choices and answer are made of: all, where a function makes them."""
    templates = [task.config.doc_to_text, task.config.doc_to_choice, task.config.doc_to_target]
    if any(map(callable, templates)):
        return list(doc)
    text = " ".join(map(str, templates))
    return [name for name in doc if re.search(rf"\b{re.escape(name)}\b", text)]


def _collect(task: LocalTask, about: dict[str, Any], total: int, items: list[Item], bos: bool) -> Scored:
    scores: dict[str, list[float]] = {}
    for item in items:
        try:
            found = task.process_results(item.doc, item.answers)
        except Exception as error:
            raise ValueError(f"task {about['task']}, item {item.row}: {type(error).__name__}: {error}") from error
        for metric, value in found.items():
            if np.isscalar(value):  # others, such as F1, are not of one item
                scores.setdefault(metric, []).append(float(value))
    if "perplexity" in scores:
        scores["log_likelihood"] = scores.pop("perplexity")  # per item it is no perplexity yet
    return Scored(
        name=about["task"],
        version=str((task.config.metadata or {}).get("version", "")),
        sha256=about["splits"][task.config.test_split or task.config.validation_split]["sha256"],
        tags=about["tags"],
        total=total,
        item=[item.row for item in items],
        scores=scores,
        log_likelihoods=[[value for value, _ in item.answers] for item in items],
        truncated=sum(item.truncated for item in items),
        bos=bos,
    )


def items(scored: list[Scored], primary: Callable[[str], str], group: str | None = None) -> dict[str, list]:
    """The columns of a result's per-item file: which question, whether it was right, and the choices' log-likelihoods.

    primary: the metric that is a task's score, by its name. `group`, what a question counts for, is its task by default.
    """
    columns: dict[str, list] = {"group": [], "task": [], "item": [], "right": [], "acc": [], "log_likelihoods": []}
    for task in scored:
        columns["group"] += [group or task.name] * len(task.item)
        columns["task"] += [task.name] * len(task.item)
        columns["item"] += task.item
        columns["right"] += [bool(value) for value in task.scores[primary(task.name)]]
        columns["acc"] += [bool(value) for value in task.scores["acc"]]
        columns["log_likelihoods"] += task.log_likelihoods
    return columns


def describe(scored: list[Scored], shots: int | str, config, log) -> dict[str, Any]:
    """The fields of a Result that say what was scored; items that had to be cut are recorded in the log."""
    for task in scored:
        if task.truncated:
            log.departure(f"{task.name}: {task.truncated} items are longer than the model's context, cut on the left")
    partial = any(len(task.item) < task.total for task in scored)
    limit = f", at most {config.limit} items a task (seed {config.seed})" if partial else ""
    bos = "+bos" if scored[0].bos else ""
    data = {task.name: {"version": task.version, "items": task.total, "sha256": task.sha256} for task in scored}
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:8]
    return {
        "protocol": f"lm-eval {version('lm_eval')}, {shots}-shot{bos}{limit}, items@{digest}",
        "n": sum(len(task.item) for task in scored),
        "partial": partial,
        "data": data,
    }
