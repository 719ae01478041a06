"""`Completion`: a sequence's way out: each sampled token becomes a `SequenceDelta`, and here it shows when to stop.

Owns: stop conditions, the detokenizer, timing. Does not know: scheduling, blocks, the runner.
"""

from __future__ import annotations

from nybble.core.outputs import FinishReason, Logprob, SequenceDelta, Timing, TokenLogprobs
from nybble.engine.sequence import Sequence
from nybble.text.detokenizer import Detokenizer
from nybble.text.tokenizer import Tokenizer


class Completion:
    """The reader's side of one sequence.

    Args:
        eos_token_ids: the model's; whether they end this sequence its parameters say.
        tokenizer: None gives token ids only.
    """

    def __init__(self, sequence: Sequence, eos_token_ids: frozenset[int], tokenizer: Tokenizer | None) -> None:
        params = sequence.request.params
        self.sequence = sequence
        self.timing = Timing(arrival_time=sequence.request.arrival_time)
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._tokenizer = tokenizer
        self._detokenizer: Detokenizer | None = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, params, sequence.request.prompt_token_ids)

    def take(
        self, token_id: int, logprobs: TokenLogprobs | None, now: float, *, is_complete: bool = False
    ) -> SequenceDelta:
        """Report the token that was just added to the sequence.

        Token ids that end it come first, then stop strings, then length; vLLM decides in this order too. The text of
        a token that ends the sequence is not shown, unless `include_stop_str_in_output`.

        Args:
            is_complete: its grammar allows no more.
        """
        sequence = self.sequence
        params = sequence.request.params
        reason: FinishReason | None = None
        stop_reason: int | str | None = None
        if token_id in sequence.end_token_ids and sequence.num_output_tokens >= params.min_tokens:
            reason = "stop"
            stop_reason = None if token_id in self._eos_token_ids else token_id
        text = ""
        if self._detokenizer is not None and (reason is None or params.include_stop_str_in_output):
            text, stop_string = self._detokenizer.append(token_id)
            if reason is None and stop_string is not None:
                reason, stop_reason = "stop", stop_string
        if reason is None and is_complete:
            reason = "stop"
        if reason is None and len(sequence.token_ids) >= sequence.max_length:
            reason = "length"
        delta = self._delta(reason, now)
        delta.token_ids = [token_id]
        delta.text = text
        delta.stop_reason = stop_reason
        if reason is not None and self._detokenizer is not None:
            delta.text += self._detokenizer.finish()
        if logprobs is not None:
            delta.logprobs = [self._name(logprobs)]
        if sequence.prompt_logprobs is not None:
            delta.prompt_logprobs = [entry and self._name(entry) for entry in sequence.prompt_logprobs]
            sequence.prompt_logprobs = None  # they are told once
        return delta

    def end(self, reason: FinishReason, now: float, error: str | None = None) -> SequenceDelta:
        """The last delta of a completion that is ended from outside. What the detokenizer held back is not shown."""
        delta = self._delta(reason, now)
        delta.error = error
        return delta

    def _delta(self, reason: FinishReason | None, now: float) -> SequenceDelta:
        sequence = self.sequence
        timing = self.timing
        is_first = timing.first_token_time is None and sequence.num_output_tokens > 0
        if is_first:
            timing.first_token_time = now
        if reason is not None:
            timing.finished_time = now
            timing.num_preemptions = sequence.num_preemptions
        return SequenceDelta(
            request_id=sequence.request.request_id,
            index=sequence.index,
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached_tokens,
            timing=timing if is_first or reason is not None else None,
        )

    def _name(self, logprobs: TokenLogprobs) -> TokenLogprobs:
        """Add the tokens' texts."""
        if self._tokenizer is None:
            return logprobs
        return {
            token_id: Logprob(entry.logprob, entry.rank, self._tokenizer.token_text(token_id))
            for token_id, entry in logprobs.items()
        }
