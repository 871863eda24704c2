"""Containers of other programs for a quantized checkpoint. Each public module is one.

A format's module has these names, nothing to inherit and nothing to register; it imports torch inside functions only, so
that a mistake is found before the seconds that this costs:

    TAGS    what the Hub should find the export by
    USAGE   how to load it, Markdown; {folder} stands for the folder of the export
    check(checkpoint, config)   raises ValueError for what the format cannot hold; config is the checkpoint's config.json
    notes(config) -> list of sentences for the card: how the numbers are stored, who cannot read them
    write(checkpoint, folder, name)   writes the export; ValueError if a number would have to be rounded

An export holds the integers and the scales of the checkpoint unchanged, or there is none.
"""

from __future__ import annotations

from types import ModuleType

from methods.core.job import registry

VLLM_USAGE = """
```python
from vllm import LLM
llm = LLM(model="{folder}")
print(llm.generate("The capital of France is")[0].outputs[0].text)
```
"""


def available() -> list[str]:
    """Names of the formats."""
    return [name.replace("_", "-") for name in registry.names("methods.export")]


def load(name: str) -> ModuleType:
    """The module of a format."""
    return registry.load("methods.export", name.replace("-", "_"))
