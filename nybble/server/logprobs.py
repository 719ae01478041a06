"""Log-probabilities in the shapes that clients know: OpenAI's of chat, its older one of completions, and vLLM's."""

from __future__ import annotations

from collections.abc import Sequence

from nybble.core.outputs import Logprob, TokenLogprobs
from nybble.server.responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, PromptLogprobs, TopLogprob
from nybble.text.token_stream import TokenStream
from nybble.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for −∞, which JSON cannot write; vLLM sends the same."""


class LogprobShaper:
    """Shapes one completion's log-probabilities, in the order of its tokens.

    Args:
        stream: decodes the same tokens, to know where in the text each begins.
        num_top: how many of the likeliest tokens are shown.
        as_ids: write tokens as "token_id:17", which is unambiguous.
    """

    def __init__(self, tokenizer: Tokenizer, stream: TokenStream, num_top: int, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._stream = stream
        self._num_top = num_top
        self._as_ids = as_ids
        self._offset = 0

    def chat(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        content = []
        for token_id, found in zip(token_ids, logprobs, strict=True):
            top = [self._top(other, entry) for other, entry in self._likeliest(found)]
            own = self._top(token_id, found[token_id])
            content.append(ChatLogprob(own.token, own.logprob, own.bytes, top))
        return ChatLogprobs(content)

    def completion(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> CompletionLogprobs:
        """An entry is None for a prompt's first token, which nothing predicts."""
        shaped = CompletionLogprobs()
        for token_id, found in zip(token_ids, logprobs, strict=True):
            shaped.text_offset.append(self._offset)
            self._offset += len(self._stream.push(token_id))
            shaped.tokens.append(self._name(token_id, None))
            shaped.token_logprobs.append(None if found is None else _finite(found[token_id].logprob))
            shaped.top_logprobs.append(None if found is None else self._named(token_id, found))
        return shaped

    def _named(self, token_id: int, found: TokenLogprobs) -> dict[str, float]:
        """The token itself and the likeliest ones. Where two have one text, the first of them is shown."""
        named: dict[str, float] = {self._name(token_id, found[token_id]): _finite(found[token_id].logprob)}
        for other, entry in self._likeliest(found):
            named.setdefault(self._name(other, entry), _finite(entry.logprob))
        return named

    def _likeliest(self, found: TokenLogprobs) -> list[tuple[int, Logprob]]:
        return sorted(found.items(), key=lambda item: item[1].rank)[: self._num_top]

    def _top(self, token_id: int, entry: Logprob) -> TopLogprob:
        text = self._text(token_id, entry)
        name = f"token_id:{token_id}" if self._as_ids else text
        return TopLogprob(name, _finite(entry.logprob), list(self._tokenizer.token_bytes(token_id)))

    def _name(self, token_id: int, entry: Logprob | None) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._text(token_id, entry)

    def _text(self, token_id: int, entry: Logprob | None) -> str:
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self._tokenizer.token_text(token_id)


def prompt_logprobs_of(logprobs: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """vLLM's shape: for each token of the prompt, id → its log-probability, rank and text."""
    return [
        None
        if found is None
        else {
            str(token_id): {
                "logprob": _finite(entry.logprob),
                "rank": entry.rank,
                "decoded_token": entry.decoded_token,
            }
            for token_id, entry in found.items()
        }
        for found in logprobs
    ]


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
