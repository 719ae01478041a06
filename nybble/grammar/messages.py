"""What the engine and the compiling process say to each other: msgspec structs, each behind its length."""

from __future__ import annotations

import msgspec

from nybble.core.structured import StructuredOutputs
from nybble.grammar.vocabulary import Vocabulary

LENGTH_BYTES = 8


class Begin(msgspec.Struct, tag=True):
    """The first message."""

    vocabulary: Vocabulary
    seconds: float  # a compilation that takes longer is killed


class Compile(msgspec.Struct, tag=True):
    form: StructuredOutputs


ToWorker = Begin | Compile


class Started(msgspec.Struct, tag=True):
    """The answer to `Begin`."""


class Compiled(msgspec.Struct, tag=True):
    """The grammar in xgrammar's JSON."""

    grammar: bytes


class Rejected(msgspec.Struct, tag=True):
    """What is wrong with it."""

    reason: str


FromWorker = Started | Compiled | Rejected

decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode


def encode(message: ToWorker | FromWorker) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body
