"""Zero-shot accuracy on lm-eval's tasks, and the averages that the papers report.

The score of a task is `acc_norm` (log-likelihood per character) for HellaSwag, ARC-challenge and OpenBookQA, and `acc` for
the others; the result has both. That is a common choice, and not every paper's: LLaMA's tables (arXiv 2302.13971) normalize
all but OpenBookQA and BoolQ by characters, and these two by the likelihood of the answer alone. An average is over its named
list of tasks, and is there only if all of them were scored. `zero_shot_margin` is the mean, over all tasks with choices, of
how far the right choice's log-likelihood lies above that of the best other one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evals import Result, metric
from evals.core.language_model import PrefixSharingLM
from evals.core.tasks import MARGINS, ScoredTask, describe, item_columns, score_tasks
from methods.core.job.options import require_positive
from methods.core.job.registry import Evaluation

EVALUATION = Evaluation("tasks")
# LLM-QAT's (arXiv 2305.17888) and LR-QAT's (arXiv 2406.06385).
EIGHT = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
SIX = ("boolq", "piqa", "winogrande", "arc_easy", "arc_challenge", "hellaswag")
NORMALIZED = ("hellaswag", "arc_challenge", "openbookqa")


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = (*EIGHT, "lambada_openai")
    limit: int | None = None  # items per task, drawn by the seed; the result is then marked as partial
    seed: int = 0

    def __post_init__(self):
        require_positive(self, "limit")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks names one twice: {', '.join(self.tasks)}")


def evaluate(model, checkpoint, config, data, log) -> Result:
    """`data` are the folders of the tasks. ValueError if they are not those of `config.tasks`."""
    if sorted(folder.name for folder in data) != sorted(config.tasks):
        raise ValueError(f"the folders {', '.join(map(str, data))} are not of the tasks {', '.join(config.tasks)}")
    lm = PrefixSharingLM.of(model, checkpoint, log)
    scored = score_tasks(lm, data, 0, config.limit, config.seed, log)
    metrics = {}
    for task in scored:
        metrics |= _metrics(task)
    for name, tasks in (("zero_shot_avg8", EIGHT), ("zero_shot_avg6", SIX)):
        if set(tasks) <= set(config.tasks):
            average = _average([task.mean(_primary(task.name)) for task in scored if task.name in tasks])
            metrics[name] = metric(*average, higher_is_better=True, unit="share", over=list(tasks))
    if choosing := [task for task in scored if "margin" in task.scores]:
        average = _average([task.mean("margin") for task in choosing])
        over = [task.name for task in choosing]
        metrics["zero_shot_margin"] = metric(*average, higher_is_better=True, unit="nats", over=over, items=MARGINS)
    return Result(metrics=metrics, items=item_columns(scored, _primary), **describe(scored, 0, config, log))


def _average(of_tasks: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    """The mean over tasks of their means, and its standard error."""
    means, errors = zip(*of_tasks, strict=True)
    return np.mean(means), None if None in errors else np.sqrt(np.square(errors).sum()) / len(errors)


def _primary(task: str) -> str:
    """The metric that is a task's score."""
    return "acc_norm" if task in NORMALIZED else "acc"


def _metrics(task: ScoredTask) -> dict[str, dict]:
    """Both accuracies of a task; for LAMBADA, accuracy and the perplexity of the last word."""
    metrics = {}
    for name in ("acc", "acc_norm"):
        if name in task.scores:
            over = [task.name] if name == _primary(task.name) else None
            value = metric(*task.mean(name), higher_is_better=True, unit="share", over=over)
            metrics[f"{task.name}/{name}"] = value
    if "log_likelihood" in task.scores:
        mean, stderr = task.mean("log_likelihood")
        perplexity = np.exp(-mean)
        error = None if stderr is None else perplexity * stderr
        metrics[f"{task.name}/perplexity"] = metric(perplexity, error, higher_is_better=False, unit="perplexity")
    return metrics
