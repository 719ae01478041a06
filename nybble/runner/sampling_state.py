"""What the sampler must remember of each slot, and what one step of it needs: `SamplingState` and `SamplingPlan`.

Owns: the slots' sampling parameters (numpy tables on the host), their token histories and allowed-token masks (on the
device, allocated once, so that no request can make memory grow). Does not know: logits, the model, stop conditions.

Setting up a slot may use Python; planning a step is array look-ups. Lists of the rows' own (logit_bias, bad_words,
held-back end tokens) are put together when a batch of new composition comes, and kept while it lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from nybble.core.batch import SequenceStart
from nybble.core.config import ResolvedConfig
from nybble.runner.random_numbers import uniforms

PARAMETERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
"""Columns of the float table. Greedy rows hold temperature 1, which divides without effect."""

NO_LOGPROBS = -1

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class BadWords:
    """W words of a step's rows, P the most ids before a word's last one. Prefixes are right-aligned."""

    rows: np.ndarray  # [W] int64
    prefixes: np.ndarray  # [W, P] int64, −1 where the prefix is shorter
    last_ids: np.ndarray  # [W] int64


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What S rows need, known on the host. Work that no row needs is left out: its flag is False, its list empty."""

    slots: np.ndarray  # [S] int64
    parameters: np.ndarray  # [len(PARAMETERS), S] float32
    top_k: np.ndarray  # [S] int64; the vocabulary's size where all are kept
    uniforms: np.ndarray  # [S] float64
    greedy: np.ndarray  # [S] bool
    prompt_lengths: np.ndarray  # [S] int64
    history_lengths: np.ndarray  # [S] int64, prompt and output tokens so far
    num_logprobs: np.ndarray  # [S] int64, NO_LOGPROBS where none are wanted
    needs_history: bool
    has_penalties: bool
    has_allowed: bool
    num_sorted: int  # likeliest tokens of a row that can decide top_k and top_p; 0: neither is used
    has_min_p: bool
    bias: tuple[np.ndarray, np.ndarray, np.ndarray] | None  # rows, ids, values; no pair twice
    banned: tuple[np.ndarray, np.ndarray] | None  # rows, ids
    bad_words: BadWords | None
    masks: tuple[np.ndarray, np.ndarray] | None = None  # rows [M] int64; allowed tokens [M, ⌈V / 32⌉] int32 words

    @property
    def is_argmax(self) -> bool:
        """Nothing is asked but the likeliest token."""
        changed = self.has_penalties or self.has_allowed or self.bias or self.banned or self.bad_words or self.masks
        return bool(self.greedy.all()) and not changed


class SamplingState:
    """Per-slot sampling state. Row max_num_seqs of the device tensors belongs to padding."""

    def __init__(self, config: ResolvedConfig, vocab_size: int, device: torch.device) -> None:
        slots = config.max_num_seqs + 1
        self.vocab_size = vocab_size
        self.max_len = config.max_model_len
        self.history = torch.zeros(slots, config.max_model_len, dtype=torch.int32, device=device)
        # One bit a token, 32 to a word, as bool rows would take 8 times as much.
        self.allowed = torch.full((slots, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)
        self._parameters = np.zeros((slots, len(PARAMETERS)), dtype=np.float32)
        self._top_k = np.full(slots, vocab_size, dtype=np.int64)
        self._seeds = np.zeros(slots, dtype=np.uint64)
        self._prompt_lengths = np.zeros(slots, dtype=np.int64)
        self._min_tokens = np.zeros(slots, dtype=np.int64)
        self._num_logprobs = np.full(slots, NO_LOGPROBS, dtype=np.int64)
        self._flags = {name: np.zeros(slots, dtype=bool) for name in ("greedy", "penalized", "history", "allowed")}
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._end_ids: dict[int, np.ndarray] = {}
        self._bad_words: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._gathered: dict[tuple[str, bytes], Any] = {}  # list and slots of a batch → `gather`'s result

    def start(self, start: SequenceStart) -> None:
        """Reset a slot for a new sequence. Python per sequence, once per admission."""
        slot, params = start.slot, start.params
        self._gathered.clear()
        self._parameters[slot] = [
            1.0 if n == "temperature" and params.is_greedy else getattr(params, n) for n in PARAMETERS
        ]
        self._top_k[slot] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self._seeds[slot] = start.seed & (2**64 - 1)
        self._prompt_lengths[slot] = len(start.prompt_token_ids)
        self._min_tokens[slot] = params.min_tokens
        self._num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        penalized = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        self._flags["greedy"][slot] = params.is_greedy
        self._flags["penalized"][slot] = penalized
        self._flags["history"][slot] = penalized or any(len(word) > 1 for word in start.bad_word_ids)
        if self._flags["history"][slot]:
            self._write_history(slot, start.prompt_token_ids + start.output_token_ids)
        self._set_allowed(slot, params.allowed_token_ids)
        self._set_lists(start)

    def _write_history(self, slot: int, token_ids: list[int]) -> None:
        self.history[slot, : len(token_ids)].copy_(torch.tensor(token_ids, dtype=torch.int32), non_blocking=True)

    def _set_allowed(self, slot: int, token_ids: list[int] | None) -> None:
        if token_ids is None:
            if self._flags["allowed"][slot]:
                self.allowed[slot].fill_(-1)
            self._flags["allowed"][slot] = False
            return
        self._flags["allowed"][slot] = True
        bits = np.zeros(self.allowed.shape[1] * 32, dtype=bool)
        bits[self._known(token_ids)] = True
        words = np.packbits(bits, bitorder="little").view(np.int32)
        self.allowed[slot].copy_(torch.from_numpy(words), non_blocking=True)

    def _set_lists(self, start: SequenceStart) -> None:
        slot, params = start.slot, start.params
        for table in (self._bias, self._end_ids, self._bad_words):
            table.pop(slot, None)
        if params.logit_bias:
            pairs = [(token_id, value) for token_id, value in params.logit_bias.items() if token_id < self.vocab_size]
            self._bias[slot] = (np.array([t for t, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float32))
        if params.min_tokens and start.end_token_ids:
            self._end_ids[slot] = self._known(start.end_token_ids)
        words = [word for word in start.bad_word_ids if word and max(word) < self.vocab_size]
        if words:
            width = max(len(word) for word in words) - 1
            prefixes = np.array([[-1] * (width + 1 - len(word)) + word[:-1] for word in words], np.int64)
            self._bad_words[slot] = (prefixes.reshape(len(words), width), np.array([w[-1] for w in words], np.int64))

    def _known(self, token_ids: list[int]) -> np.ndarray:
        """The ids that the model has logits for: a tokenizer may know more."""
        ids = np.array(token_ids, dtype=np.int64)
        return ids[ids < self.vocab_size]

    def plan(
        self, slots: np.ndarray, num_output_tokens: np.ndarray, masks: Sequence[bytes | None] = ()
    ) -> SamplingPlan:
        """What these slots need in a step; the arrays may be sliced views, one plan for each slice of a large batch.

        Args:
            masks: of each row, as in `Row.mask`; may be left out where no row has one.
        """
        parameters = self._parameters[slots].T
        penalized = self._flags["penalized"][slots]
        top_k, top_p, min_p = self._top_k[slots], parameters[1], parameters[2]
        random = ~self._flags["greedy"][slots]
        return SamplingPlan(
            slots=slots,
            parameters=np.ascontiguousarray(parameters),
            top_k=top_k,
            uniforms=uniforms(self._seeds[slots], num_output_tokens),
            greedy=~random,
            prompt_lengths=self._prompt_lengths[slots],
            history_lengths=np.minimum(self._prompt_lengths[slots] + num_output_tokens, self.max_len - 1),
            num_logprobs=self._num_logprobs[slots],
            needs_history=bool(self._flags["history"][slots].any()),
            has_penalties=bool(penalized.any()),
            has_allowed=bool(self._flags["allowed"][slots].any()),
            num_sorted=int(top_k[random & ((top_k < self.vocab_size) | (top_p < 1))].max(initial=0)),
            has_min_p=bool((random & (min_p > 0)).any()),
            bias=self._of_batch("bias", slots, self._biases) if self._bias else None,
            banned=self._held_back(slots, num_output_tokens) if self._end_ids else None,
            bad_words=self._of_batch("bad_words", slots, self._words_of) if self._bad_words else None,
            masks=_stack(masks),
        )

    def append(self, slots: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Add sampled tokens [R] to the histories, on the device."""
        self.history[slots, positions] = token_ids.clamp(min=0).int()

    def _of_batch(self, name: str, slots: np.ndarray, gather: Callable[[np.ndarray], T]) -> T:
        key = (name, slots.tobytes())
        if key not in self._gathered:
            self._gathered[key] = gather(slots)
        found: T = self._gathered[key]
        return found

    def _biases(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        found = [(row, *self._bias[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._bias]
        return _flatten(found) if found else None

    def _held_back(self, slots: np.ndarray, num_output_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """End tokens of the rows that have not reached min_tokens."""
        found = self._of_batch("end_ids", slots, self._ends)
        if found is None:
            return None
        rows, ids = found
        is_held = (num_output_tokens < self._min_tokens[slots])[rows]
        return (rows[is_held], ids[is_held]) if is_held.any() else None

    def _ends(self, slots: np.ndarray) -> tuple[np.ndarray, ...] | None:
        found = [(row, self._end_ids[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._end_ids]
        return _flatten(found) if found else None

    def _words_of(self, slots: np.ndarray) -> BadWords | None:
        found = [(row, *self._bad_words[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._bad_words]
        if not found:
            return None
        width = max(prefixes.shape[1] for _, prefixes, _ in found)
        padded = [np.pad(p, ((0, 0), (width - p.shape[1], 0)), constant_values=-1) for _, p, _ in found]
        rows, last_ids = _flatten([(row, last_ids) for row, _, last_ids in found])
        return BadWords(rows=rows, prefixes=np.concatenate(padded), last_ids=last_ids)


def _stack(masks: Sequence[bytes | None]) -> tuple[np.ndarray, np.ndarray] | None:
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return None
    words = np.frombuffer(bytearray().join(masks[row] or b"" for row in rows), dtype=np.int32)
    return np.array(rows, dtype=np.int64), words.reshape(len(rows), -1)


def _flatten(found: list[tuple]) -> tuple[np.ndarray, ...]:
    """[(row, array, …)] → the row repeated for each element, and the concatenated arrays."""
    columns = list(zip(*found, strict=True))
    rows = np.repeat(np.array(columns[0], dtype=np.int64), [len(array) for array in columns[1]])
    return rows, *(np.concatenate(arrays) for arrays in columns[1:])
