"""`FakeEngine`: what the server takes for an `EngineClient`, in the test's own process. It answers every prompt alike.

The answer is real tokens through the real detokenizer, so stop strings, split characters and token counts are true.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from nybble.core.errors import EngineDeadError
from nybble.core.outputs import Logprob, SequenceDelta, TokenLogprobs
from nybble.core.request import Request
from nybble.text.detokenizer import Detokenizer
from nybble.text.tokenizer import Tokenizer

ANSWER = "Hello there! 12 + 30 = 42 — naïve 😀, isn't it?"


class FakeReady(msgspec.Struct):
    model: str = "fake"
    max_model_len: int = 512
    num_kv_tokens: int = 4096
    vocab_size: int = 512
    phase_seconds: dict[str, float] = {}
    default_sampling: dict[str, Any] = {}
    chat_template_available: bool = True
    model_path: str = ""
    settings: dict[str, str] = msgspec.field(default_factory=lambda: {"scheduling_policy": "priority"})


class FakeEngine:
    """
    Args:
        tokens_at_once: deltas in each list that a stream yields.
        error: raised in place of an answer.
        fail_after: so many tokens later the engine dies.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        answer: str = ANSWER,
        *,
        tokens_at_once: int = 1,
        error: Exception | None = None,
        fail_after: int | None = None,
        num_cached_tokens: int = 0,
    ) -> None:
        self.ready: FakeReady | None = FakeReady(vocab_size=tokenizer.vocab_size)
        self.is_serving = True
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.finished: list[str] = []  # from outside, by `finish`
        self.num_open = 0
        self.num_resets = 0
        self._open: list[str] = []
        self.error = error
        self.fail_after = fail_after
        self.first_gate: asyncio.Event | None = None  # waited for before the first token, if set
        self.gate: asyncio.Event | None = None  # and before each later one
        self._tokenizer = tokenizer
        self._answer_ids = tokenizer.encode(answer, add_special_tokens=False)
        self._tokens_at_once = tokens_at_once
        self._num_cached_tokens = num_cached_tokens

    @property
    def open_ids(self) -> list[str]:
        return list(self._open)

    def abort(self, request_id: str) -> None:
        self._open.remove(request_id)

    def finish(self, request_id: str) -> None:
        self._open.remove(request_id)
        self.finished.append(request_id)

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    async def stream(self, request: Request) -> AsyncGenerator[list[SequenceDelta]]:
        if self.error is not None:
            raise self.error
        self.requests.append(request)
        self._open.append(request.request_id)
        self.num_open += 1
        is_finished = False
        try:
            if self.first_gate is not None:
                await self.first_gate.wait()
            pending: list[SequenceDelta] = []
            for position, deltas in enumerate(self._steps(request)):
                if request.request_id not in self._open:  # aborted from outside
                    deltas = [
                        SequenceDelta(request_id=request.request_id, index=index, finish_reason="abort")
                        for index in range(request.params.n)
                    ]
                    pending += deltas
                    break
                pending += deltas
                if self.fail_after == position:
                    raise EngineDeadError("the fake died of a secret reason")
                if len(pending) >= self._tokens_at_once:
                    yield pending
                    pending = []
                    await asyncio.sleep(0)
                    if self.gate is not None:
                        await self.gate.wait()
            if pending:
                yield pending
            is_finished = True
        finally:
            self.num_open -= 1
            if request.request_id in self._open:
                self._open.remove(request.request_id)
            if not is_finished and request.request_id not in self.finished:
                self.aborted.append(request.request_id)

    def _steps(self, request: Request) -> list[list[SequenceDelta]]:
        rows = [self._completion(request, index) for index in range(request.params.n)]
        longest = max(map(len, rows))
        return [[row[step] for row in rows if step < len(row)] for step in range(longest)]

    def _completion(self, request: Request, index: int) -> list[SequenceDelta]:
        params = request.params
        detokenizer = Detokenizer(self._tokenizer, params, request.prompt_token_ids)
        eos = self._tokenizer.eos_token_id
        assert eos is not None
        most = self.ready.max_model_len - len(request.prompt_token_ids) if self.ready else 16
        most = min(most, params.max_tokens or most)
        ids = (
            (self._answer_ids * (most // len(self._answer_ids) + 1)) if params.ignore_eos else [*self._answer_ids, eos]
        )
        deltas = []
        for position, token_id in enumerate(ids[:most]):
            delta = SequenceDelta(
                request_id=request.request_id,
                index=index,
                token_ids=[token_id],
                num_cached_tokens=self._num_cached_tokens,
            )
            is_end = token_id == eos and not params.ignore_eos
            if not is_end:
                delta.text, stop = detokenizer.append(token_id)
                if stop is not None:
                    delta.finish_reason, delta.stop_reason = "stop", stop
            else:
                delta.finish_reason = "stop"
            if delta.finish_reason is None and position + 1 == most:
                delta.finish_reason = "length"
            if delta.finish_reason is not None:
                delta.text += detokenizer.finish()
            if params.logprobs is not None:
                delta.logprobs = [self.logprobs_of(token_id, params.logprobs, position)]
            if index == 0 and position == 0 and params.prompt_logprobs is not None:
                known = enumerate(request.prompt_token_ids[1:])
                delta.prompt_logprobs = [None] + [self.logprobs_of(i, params.prompt_logprobs, p) for p, i in known]
            deltas.append(delta)
            if delta.finish_reason is not None:
                break
        return deltas

    def logprobs_of(self, token_id: int, num_top: int, position: int) -> TokenLogprobs:
        """As the engine's: the token itself first, then the likeliest. At odd positions it is the third likeliest."""
        rank = 3 if position % 2 else 1
        others = [(token_id + step) % self._tokenizer.vocab_size for step in range(1, 30)]
        order = [*others[: rank - 1], token_id, *others[rank - 1 :]]
        found = {token_id: self._entry(token_id, rank)}
        for place, other in enumerate(order[:num_top], start=1):
            found.setdefault(other, self._entry(other, place))
        return found

    def _entry(self, token_id: int, rank: int) -> Logprob:
        return Logprob(-0.25 * rank, rank, self._tokenizer.token_text(token_id))
