"""`Workload`: which conversations are sent. The same settings and seed give the same ones, in any process."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nybble.bench.dataset import DatasetKind, Entry, read_dataset
from nybble.bench.prompt_text import PromptWriter, TokenWriter, WordCost, WordWriter
from nybble.bench.target import Route
from nybble.core.errors import ConfigError

Prompt = str | list[int] | list[dict[str, Any]]


class WorkloadSettings(msgspec.Struct, kw_only=True, frozen=True):
    """Lengths are in tokens, from least to most (uniform)."""

    input_len: tuple[int, int] = (128, 128)
    output_len: tuple[int, int] | None = None  # None: what the dataset says, else 64
    prefix_len: int = 0  # shared, before each prompt
    num_prefixes: int = 1
    num_turns: int = 1
    dataset: str | None = None
    dataset_kind: DatasetKind | None = None  # None: seen from the file
    seed: int = 0
    repeats_prompts: bool = False  # every point and repeat sends the same ones
    as_ids: bool = False
    tokenizer: str | None = None  # directory
    word_cost: WordCost = WordCost()
    route: Route = "completions"

    @property
    def is_all_new(self) -> bool:
        """No two requests of a run share more than a few tokens."""
        return self.dataset is None and not self.prefix_len and self.num_turns == 1 and not self.repeats_prompts

    def check(self) -> None:
        """
        Raises:
            ConfigError: a setting is out of range or contradicts another.
        """
        for name, span in (("--input-len", self.input_len), ("--output-len", self.output_len or (1, 1))):
            if not 1 <= span[0] <= span[1]:
                raise ConfigError(f"{name}: give a length of at least 1 token, or a range like 64-256")
        if self.prefix_len < 0 or self.num_prefixes < 1 or self.num_turns < 1:
            raise ConfigError("--prefix-len must be at least 0, --num-prefixes and --turns at least 1")
        if self.as_ids and (self.route != "completions" or self.num_turns > 1 or self.tokenizer is None):
            raise ConfigError("--prompt-ids needs --route completions, one turn, and --tokenizer")


class Turn(NamedTuple):
    """One request of a conversation: what is added to what was said, and how many tokens are asked for."""

    prompt: Prompt
    num_output_tokens: int


class Workload:
    """Conversations, most of one turn.

    Args:
        writer: of generated prompts; None: as the settings say.
    """

    def __init__(self, settings: WorkloadSettings, writer: PromptWriter | None = None) -> None:
        settings.check()
        self.settings = settings
        self._writer = writer or _writer(settings)
        self.entries: Sequence[Entry] | None = None
        if settings.dataset is not None:
            self.entries = read_dataset(Path(settings.dataset), settings.dataset_kind, self._writer.count)

    @property
    def count(self) -> Callable[[str], int] | None:
        """Tells how many tokens a text has, where the tokenizer is known."""
        return self._writer.count if self._writer.is_exact else None

    def due_times(self, num_conversations: int) -> list[float] | None:
        """When a trace says its requests came, in seconds; None where the workload says nothing."""
        if self.entries is None or self.entries[0].time is None:
            return None
        times = [entry.time or 0.0 for entry in self.entries[:num_conversations]]
        return [time - times[0] for time in times]

    def conversation(self, part: str, index: int) -> list[Turn]:
        """The turns of conversation `index` in a part of the run, whose name keeps prompts of parts apart."""
        settings = self.settings
        seed = f"{settings.seed}" if settings.repeats_prompts else f"{settings.seed} {part}"
        draw = random.Random(f"{seed} {index}")
        if self.entries is None:
            turns = [self._random_turn(draw) for _ in range(settings.num_turns)]
        else:
            turns = self._entry_turns(self.entries, index, draw)
        if settings.prefix_len:
            # Prefixes are the same all through a part, and others in the next one.
            prefix_draw = random.Random(f"{seed} prefix {index % settings.num_prefixes}")
            prefix = self._writer.write(prefix_draw, settings.prefix_len)
            turns[0] = turns[0]._replace(prompt=_joined(prefix, turns[0].prompt))
        if settings.route == "chat":
            turns = [turn._replace(prompt=_messages(turn.prompt)) for turn in turns]
        return turns

    def _random_turn(self, draw: random.Random) -> Turn:
        num_input = draw.randint(*self.settings.input_len)
        num_output = draw.randint(*(self.settings.output_len or (64, 64)))
        return Turn(self._writer.write(draw, num_input), num_output)

    def _entry_turns(self, entries: Sequence[Entry], index: int, draw: random.Random) -> list[Turn]:
        order = index
        if entries[0].time is None:
            shuffled = list(range(len(entries)))
            random.Random(f"{self.settings.seed} order").shuffle(shuffled)
            order = shuffled[index % len(entries)]
        entry = entries[order % len(entries)]
        turns = []
        for prompt, num_output in entry.turns[: self.settings.num_turns]:
            if isinstance(prompt, int):  # a trace tells lengths only
                prompt = self._writer.write(draw, prompt)
            if self.settings.output_len is not None:
                num_output = draw.randint(*self.settings.output_len)
            if self.settings.route != "chat" and isinstance(prompt, list) and isinstance(prompt[0], dict):
                raise ConfigError(f"{self.settings.dataset} has conversations: give --route chat")
            turns.append(Turn(prompt, num_output or 64))
        return turns


def _writer(settings: WorkloadSettings) -> PromptWriter:
    if settings.tokenizer is None:
        return WordWriter(settings.word_cost)
    num_fixed = round(settings.word_cost.fixed)
    return TokenWriter(Path(settings.tokenizer), as_ids=settings.as_ids, num_fixed=num_fixed)


def _joined(prefix: str | list[int], prompt: Prompt) -> Prompt:
    if isinstance(prefix, str) and isinstance(prompt, str):
        return f"{prefix} {prompt}"
    if isinstance(prefix, list) and isinstance(prompt, list):
        return [*prefix, *prompt]
    raise ConfigError("--prefix-len goes with generated prompts and prompts of plain text")


def _messages(prompt: Prompt) -> Prompt:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt and isinstance(prompt[0], dict):
        return prompt
    raise ConfigError("token ids cannot be sent to the chat route: give --route completions")
