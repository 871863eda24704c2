"""The protocol of an evaluation on windows of a text: which windows of which text were scored, and how."""

from __future__ import annotations

from typing import Any


def protocol(how: str, text: dict[str, Any], scored: int, total: int) -> str:
    """`how`, the text's name and hash, and the number of windows that were scored of the `total` if a limit left some out.

    text: what the file of its windows says about it, with `dataset` and `text_sha256`.
    """
    windows = "" if scored == total else f"/first-{scored}-of-{total}"
    return f"{how}/{text['dataset']}@{text['text_sha256'][:8]}{windows}"
