"""Where the definitions of lm-eval's tasks are. Importing lm-eval takes seconds, and a check of a configuration must not."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def task_folder() -> Path:
    """The folder of YAML files in the installed lm-eval; found without importing it."""
    return Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
