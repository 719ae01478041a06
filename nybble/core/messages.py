"""What the API process and the engine process say to each other: msgspec structs, encoded as MessagePack.

Nothing received is unpickled or evaluated; whatever does not decode to one of these types is an error of the sender.
"""

from __future__ import annotations

import msgspec

from nybble.core.outputs import SequenceDelta
from nybble.core.request import Request
from nybble.core.stats import EngineStats


class Submit(msgspec.Struct, tag=True):
    """Queue this request. Answered by its deltas, or by `Refused`."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """End a request; its last deltas say `abort`. Ids that are not open are ignored."""

    request_id: str


class Close(msgspec.Struct, tag=True):
    """Drop everything and exit."""


ToEngine = Submit | Abort | Close


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
