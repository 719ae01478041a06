"""What the API process and the engine process say to each other: msgspec structs, encoded as MessagePack.

Nothing received is unpickled or evaluated; whatever does not decode to one of these types is an error of the sender.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

import msgspec

from nybble.core.outputs import FinishReason, SequenceDelta
from nybble.core.request import Request
from nybble.core.sampling import SamplingParams
from nybble.core.stats import EngineStats


class Prompt(msgspec.Struct, array_like=True):
    """A `Request` but for its parameters, and for its text, which the engine does not need."""

    request_id: str
    token_ids: list[int]
    priority: int
    cache_salt: str
    arrival_time: float


class Submit(msgspec.Struct, tag=True):
    """Queue requests that share their parameters. Each is answered by its deltas, or by `Refused`."""

    params: SamplingParams
    prompts: list[Prompt]

    @classmethod
    def of(cls, params: SamplingParams, requests: Iterable[Request]) -> Self:
        prompts = [
            Prompt(item.request_id, item.prompt_token_ids, item.priority, item.cache_salt, item.arrival_time)
            for item in requests
        ]
        return cls(params, prompts)

    def requests(self) -> Iterator[Request]:
        for prompt in self.prompts:
            yield Request(
                request_id=prompt.request_id,
                prompt_token_ids=prompt.token_ids,
                params=self.params,
                priority=prompt.priority,
                cache_salt=prompt.cache_salt,
                arrival_time=prompt.arrival_time,
            )


class Abort(msgspec.Struct, tag=True):
    """End a request; its last deltas give the reason. Ids that are not open are ignored."""

    request_id: str
    reason: FinishReason = "abort"


class ResetPrefixCache(msgspec.Struct, tag=True):
    """Forget what idle and held blocks contain: no later request finds a prefix of before."""


class Close(msgspec.Struct, tag=True):
    """Drop everything and exit."""


ToEngine = Submit | Abort | ResetPrefixCache | Close


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine is built and serves."""

    model: str
    model_path: str  # directory with the tokenizer
    max_model_len: int
    vocab_size: int
    num_kv_tokens: int
    block_size: int
    device: str
    phase_seconds: dict[str, float]
    settings: dict[str, str]  # every setting as it was decided
    default_sampling: dict[str, float | int]


class StartFailed(msgspec.Struct, tag=True):
    """The engine could not be built; the process exits. `kind` is the name of a class in core.errors, or of another."""

    kind: str
    message: str


class Refused(msgspec.Struct, tag=True):
    """A request that can never be served."""

    request_id: str
    message: str
    parameter: str | None = None


class Stepped(msgspec.Struct, tag=True):
    """A step's deltas; without any and with `seconds` 0, a sign of life."""

    stats: EngineStats
    deltas: list[SequenceDelta] = []
    seconds: float = 0.0


class Died(msgspec.Struct, tag=True):
    """The engine stopped for good; the process exits."""

    message: str


FromEngine = Ready | StartFailed | Refused | Stepped | Died

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
