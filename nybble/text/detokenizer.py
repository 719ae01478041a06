"""`Detokenizer`: one completion's tokens become text to show, and stop strings end it.

Owns: what is held back (bytes of an unfinished character, and the tail that may still become a stop string).
Does not know: token-id stop conditions, end-of-sequence tokens, who reads the text.
The work for a token does not grow with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nybble.core.sampling import SamplingParams
from nybble.text.stop_strings import stop_automaton
from nybble.text.tokenizer import Tokenizer


class TextUpdate(NamedTuple):
    """What one token changed.

    text: may be shown now; later tokens never take it back.
    stop: the stop string that ended the text, else None.
    """

    text: str
    stop: str | None = None


class Detokenizer:
    """Turns the tokens of one completion into text.

    The texts of all updates and of `finish`, concatenated, equal the decode of all tokens at once, cut at the first
    stop string. First is the one that is complete first, the longest if several are: so the result does not depend on
    how the text is cut into tokens. Stop strings completed by fewer than `params.min_tokens` tokens do not count.

    Args:
        prompt_token_ids: what the completion continues; some tokenizers drop a leading space only where there is none.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self._stream = tokenizer.open_stream(
            skip_special_tokens=params.skip_special_tokens, prompt_token_ids=prompt_token_ids
        )
        stops = params.stop_strings
        self._automaton = stop_automaton(tuple(stops)) if stops else None
        self._keep_stop = params.include_stop_str_in_output
        self._num_tokens_to_ignore = params.min_tokens - 1
        self._state = 0
        self._held = ""  # always as long as the automaton's state is deep
        self._stopped = False

    def append(self, token_id: int) -> TextUpdate:
        """Take the next token. After a stop string was found no more may come."""
        assert not self._stopped, "token after a stop string"
        text = self._stream.push(token_id)
        if self._automaton is None:
            return TextUpdate(text)
        update = self._search(text, ignore_matches=self._num_tokens_to_ignore > 0)
        self._num_tokens_to_ignore -= 1
        return update

    def finish(self) -> str:
        """What was held back, when the completion ends for another reason than a stop string ("" after one).

        A stop string that only the last unfinished bytes complete still cuts the text.
        """
        if self._stopped:
            return ""
        text = self._stream.flush()
        if self._automaton is None:
            return text
        shown = self._search(text, ignore_matches=self._num_tokens_to_ignore >= 0).text
        held, self._held = self._held, ""
        return shown + held

    def _search(self, text: str, *, ignore_matches: bool) -> TextUpdate:
        assert self._automaton is not None
        self._state, num_read, stop = self._automaton.advance(self._state, text, ignore_matches=ignore_matches)
        pending = self._held + text
        if stop is not None:
            end = len(self._held) + num_read
            self._held = ""
            self._stopped = True
            return TextUpdate(pending[: end if self._keep_stop else end - len(stop)], stop)
        num_certain = len(pending) - self._automaton.depth[self._state]
        self._held = pending[num_certain:]
        return TextUpdate(pending[:num_certain])
