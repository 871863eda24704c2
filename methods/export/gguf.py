"""GGUF, for llama.cpp and what is built on it: methods/core/model/gguf.py writes it, for timing too."""

from methods.core.model.gguf import check, notes, write

__all__ = ["TAGS", "USAGE", "check", "notes", "write"]

TAGS = ("gguf",)
USAGE = """\
```bash
llama-cli -m {folder}/model.gguf -p "The capital of France is" -n 32
```

```python
from transformers import AutoModelForCausalLM  # pip install transformers gguf accelerate; dequantizes when it loads
model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="model.gguf")
```
"""
