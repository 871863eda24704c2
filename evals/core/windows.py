"""What evaluations on windows of a text share: the protocol, that is, which windows were scored and how, and their memory."""

from __future__ import annotations

from typing import Any

# Tokens whose predictions over the whole vocabulary are in fp32 or fp64 at a time.
JUDGED = 32


def protocol(how: str, text: dict[str, Any], scored: int, total: int) -> str:
    """`how`, the text's name and hash, and the number of windows that were scored of the `total` if a limit left some out.

    text: what the file of its windows says about it, with `dataset` and `text_sha256`.
    """
    windows = "" if scored == total else f"/first-{scored}-of-{total}"
    return f"{how}/{text['dataset']}@{text['text_sha256'][:8]}{windows}"
