"""MMLU: 57 subjects, four choices, with examples from the subject's development set (Hendrycks et al., arXiv 2009.03300).

The score is over questions, not over subjects, as lm-eval's groups have it with `weight_by_size`. So are the scores of the
four categories. `mmlu_margin_Nshot` is the mean of how far the right answer's log-likelihood lies above the best other one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evals import Result, mean_and_stderr, metric
from evals.core.language_model import PrefixSharingLM
from evals.core.tasks import MARGINS, ScoredTask, describe, item_columns, score_tasks
from methods.core.job.options import require_positive
from methods.core.job.registry import Evaluation

EVALUATION = Evaluation("tasks")
CATEGORIES = ("stem", "humanities", "social_sciences", "other")


@dataclass(frozen=True)
class Config:
    shots: tuple[int, ...] = (5,)  # numbers of examples; each is a score of its own
    subjects: tuple[str, ...] | None = None  # default all 57; the result of fewer is marked as partial
    limit: int | None = None  # questions per subject, drawn by the seed; the result is then marked as partial
    seed: int = 0

    def __post_init__(self):
        require_positive(self, "limit")
        if bad := [n for n in self.shots if not 0 <= n <= 5]:
            raise ValueError(f"shots has {bad[0]}; a subject has five examples, so 0 to 5")
        for name in ("shots", "subjects"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names one twice: {', '.join(map(str, values))}")
        valid = self.available()
        if unknown := [s for s in self.subjects or () if s not in valid]:
            raise ValueError(f"subjects has {unknown[0]!r}; valid: {', '.join(valid)}")

    @staticmethod
    def available() -> list[str]:
        """The names of lm-eval's subjects."""
        from evals.core.definitions import task_folder  # here, as a declaration may not import it

        return sorted(path.stem.removeprefix("mmlu_") for path in task_folder().glob("mmlu/default/mmlu_*.yaml"))


def evaluate(model, checkpoint, config, data, log) -> Result:
    """`data` is a list of one folder, that of all subjects."""
    (folder,) = data
    chosen = config.subjects or config.available()
    folders = [folder / f"mmlu_{subject}" for subject in chosen]
    lm = PrefixSharingLM.of(model, checkpoint, log)
    metrics, columns, descriptions = {}, [], []
    for shots in config.shots:
        scored = score_tasks(lm, folders, shots, config.limit, config.seed, log)
        name = f"mmlu_{shots}shot"
        metrics[name] = _accuracy(scored, over=[name])
        margins = mean_and_stderr(np.concatenate([task.scores["margin"] for task in scored]))
        metrics[f"mmlu_margin_{shots}shot"] = metric(
            *margins, higher_is_better=True, unit="nats", over=[name], items=MARGINS
        )
        for category in CATEGORIES:
            if members := [task for task in scored if f"mmlu_{category}_tasks" in task.tags]:
                metrics[f"{name}/{category}"] = _accuracy(members)
        columns.append(item_columns(scored, lambda _: "acc", name))
        descriptions.append(describe(scored, "/".join(map(str, config.shots)), config, log))
    about = descriptions[0] | {"n": sum(description["n"] for description in descriptions)}
    if len(chosen) < len(config.available()):
        about["protocol"] += f", {len(chosen)} of {len(config.available())} subjects"
        about["partial"] = True
    items = {key: [value for part in columns for value in part[key]] for key in columns[0]}
    return Result(metrics=metrics, items=items, **about)


def _accuracy(tasks: list[ScoredTask], over: list[str] | None = None) -> dict:
    """Share of right answers over the questions of all these subjects."""
    values = np.concatenate([task.scores["acc"] for task in tasks])
    return metric(*mean_and_stderr(values), higher_is_better=True, unit="share", over=over)
