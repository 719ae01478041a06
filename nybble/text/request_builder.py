"""`RequestBuilder`: a prompt or a conversation, as users give it, becomes a `Request`.

Owns: request ids, and which sampling parameters apply when the user names none. Does not know: the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from nybble.core.errors import ModelError, RequestError
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Conversation = str | Sequence[Mapping[str, Any]]
"""A user's message, or a list of messages: dicts with `role` and `content`."""


class RequestBuilder:
    """Makes the requests for one model.

    Args:
        tokenizer: None accepts token ids only.
        default_sampling: the checkpoint's recommendations, in `SamplingParams`' names.

    Raises:
        ModelError: a recommendation is out of its range.
    """

    def __init__(self, tokenizer: Tokenizer | None, default_sampling: Mapping[str, Any]) -> None:
        self.tokenizer = tokenizer
        self._default_sampling = _checked(default_sampling)
        self._ids = itertools.count()

    def default_params(self, **wishes: Any) -> SamplingParams:
        """The checkpoint's recommended sampling with `wishes` on top."""
        return SamplingParams(**{**self._default_sampling, **wishes})

    def from_prompt(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Request:
        """A request to continue a text or a list of token ids.

        Raises:
            RequestError: the prompt is neither, or the model has no tokenizer for it.
        """
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise RequestError(
                f"a prompt must be text or a list of token ids, got {type(prompt).__name__}", parameter="prompt"
            )
        if isinstance(prompt, str):
            token_ids, text = self._need_tokenizer().encode(prompt), prompt
        else:
            token_ids, text = list(prompt), None
        return Request(
            request_id=self._next_id() if request_id is None else request_id,
            prompt_token_ids=token_ids,
            prompt=text,
            params=self.default_params() if params is None else params,
            priority=priority,
            cache_salt=cache_salt,
        )

    def from_chat(
        self,
        messages: Conversation,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **template_options: Any,
    ) -> Request:
        """A request to answer a conversation; `template_options` are those of `Tokenizer.render_chat`.

        Without `params` the answer may fill the model's context, unless the checkpoint recommends a length.
        """
        tokenizer = self._need_tokenizer()
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = tokenizer.render_chat(messages, **template_options)
        return Request(
            request_id=self._next_id() if request_id is None else request_id,
            # The template has written the special tokens already.
            prompt_token_ids=tokenizer.encode(text, add_special_tokens=False),
            prompt=text,
            params=SamplingParams(**{"max_tokens": None, **self._default_sampling}) if params is None else params,
            priority=priority,
            cache_salt=cache_salt,
        )

    def _next_id(self) -> str:
        return f"request-{next(self._ids)}"

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer; give token ids", parameter="prompt")
        return self.tokenizer


def _checked(recommended: Mapping[str, Any]) -> dict[str, Any]:
    """Checked here, for in a request's error nothing would say that generation_config.json is at fault."""
    values = dict(recommended)
    if isinstance(top_k := values.get("top_k"), float) and top_k.is_integer():  # some tools write 50.0
        values["top_k"] = int(top_k)
    try:
        SamplingParams(**values)
    except (RequestError, TypeError) as error:
        raise ModelError(f"generation_config.json: {error}; correct the file, or delete the field there") from None
    return values
