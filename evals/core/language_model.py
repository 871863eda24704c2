"""lm-eval's model class for Hugging Face models, its log-likelihoods computed with shared prefixes."""

from __future__ import annotations

import logging
from pathlib import Path

from lm_eval.models.huggingface import HFLM, _add_special_kwargs, has_bos_prefix

from evals.core.prefix import log_likelihoods
from methods.core.tokens import added_bos, added_tokens, load_tokenizer

STRINGS = 1_000  # strings that are tokenized per call

logging.getLogger("lm_eval").setLevel(logging.ERROR)


class PrefixSharingLM(HFLM):
    """Answers lm-eval's requests for log-likelihoods, every prefix that they share computed once (evals/core/prefix.py).

    Everything about tokens is inherited: how context and continuation are divided, the BOS token, which is there if the
    tokenizer adds one, and that a request longer than the model's context is cut on the left. Unlike lm-eval's class, this
    one keeps the BOS token when it cuts a request.
    """

    def __init__(self, model, tokenizer, log):
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
        self.log = log
        self.bos = added_bos(tokenizer)
        if behind := added_tokens(tokenizer)[1]:  # lm-eval would score that in place of what it stands behind
            raise ValueError(
                f"the tokenizer adds {tokenizer.decode(behind)!r}; tasks need one that puts nothing behind a text"
            )
        self.encoded: dict[str, list[int]] = {}
        self.truncated: list[bool] = []  # for each request of the last call, whether it was cut

    @classmethod
    def of(cls, model, checkpoint: Path, log) -> PrefixSharingLM:
        """The model with the tokenizer of its checkpoint."""
        return cls(model, load_tokenizer(checkpoint), log)

    def loglikelihood(self, requests, disable_tqdm=False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would give it) of each request's continuation."""
        # Many strings in one call are tokenized on all cores. A set has the context of several choices only once.
        strings = {part for request in requests for part in _encoded_parts(*request.args)}
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
        tokens, self.truncated = [], []
        for _, context, continuation in requests:
            whole = context + continuation
            self.truncated.append(len(whole) > longest)
            if self.truncated[-1]:
                start = [] if self.bos is None else [self.bos]
                whole = start + whole[len(start) - longest :]
            tokens.append((whole[: -len(continuation)], continuation))
        return log_likelihoods(self.model, tokens, self.log)


def _encoded_parts(context: str, continuation: str) -> tuple[str, str]:
    """The strings that lm-eval encodes for a request: it moves spaces at the end of the context to the continuation."""
    return context.rstrip(), context + continuation
