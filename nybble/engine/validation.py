"""`RequestLimits`: what a model and its KV cache can serve. More than that is refused at once, with the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nybble.core.checks import shown
from nybble.core.errors import RequestError
from nybble.core.request import Request


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int

    def check(self, request: Request) -> int:
        """Return the most tokens, prompt included, that the completions of `request` can come to.

        Raises:
            RequestError: the request can never be served.
        """
        self._check_token_ids(request)
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_prompt_tokens} tokens; with max_model_len = {self.max_model_len} it can have at "
                f"most {self.max_model_len - 1}, so that one can be generated; shorten it or raise max_model_len",
                parameter="prompt_token_ids",
            )
        max_tokens = request.params.max_tokens
        max_length = self.max_model_len if max_tokens is None else num_prompt_tokens + max_tokens
        max_length = min(max_length, self.max_model_len)
        self._check_memory(num_prompt_tokens, max_length)
        return max_length

    def _check_token_ids(self, request: Request) -> None:
        if not request.prompt_token_ids:
            raise RequestError("the prompt has no tokens; it needs at least one", parameter="prompt_token_ids")
        params = request.params
        for name, token_ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            self.check_in_vocabulary(name, token_ids)

    def check_in_vocabulary(self, name: str, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"{name} holds {shown(token_id)}; "
                    f"token ids of this model are integers in [0, {self.vocab_size - 1}]",
                    parameter=name,
                )

    def _check_memory(self, num_prompt_tokens: int, max_length: int) -> None:
        """A sequence must fit in the cache alone: one that outgrows it could never end. The last token needs no KV."""
        num_cache_tokens = self.num_blocks * self.block_size
        if max_length - 1 <= num_cache_tokens:
            return
        largest = num_cache_tokens + 1 - num_prompt_tokens
        remedy = f"ask for max_tokens ≤ {largest}" if largest > 0 else "shorten the prompt"
        raise RequestError(
            f"this request can need {max_length - 1} tokens of KV cache ({num_prompt_tokens} of the prompt and up to "
            f"{max_length - num_prompt_tokens} generated, the last of which needs none); the whole cache holds "
            f"{num_cache_tokens} ({self.num_blocks} blocks of {self.block_size}); {remedy}, or give the cache more "
            f"memory (kv_cache_memory_bytes, gpu_memory_utilization or cache_max_entry_count)",
            parameter="max_tokens" if largest > 0 else "prompt_token_ids",
        )
