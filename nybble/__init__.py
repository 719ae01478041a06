"""nybble: inference for 4-bit (AWQ) language models.

    from nybble import LLM, SamplingParams

    with LLM("tiny") as llm:
        print(llm.chat([{"role": "user", "content": "What is 12 + 30?"}])[0].outputs[0].text)

Names are loaded at first use, so that `import nybble` is quick and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.async_llm import AsyncLLM
    from nybble.core import errors
    from nybble.core.config import EngineConfig
    from nybble.core.outputs import CompletionOutput, RequestOutput
    from nybble.core.sampling import SamplingParams
    from nybble.core.structured import StructuredOutputs
    from nybble.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "errors",
]

HOMES = {
    "LLM": "nybble.llm",
    "AsyncLLM": "nybble.async_llm",
    "CompletionOutput": "nybble.core.outputs",
    "EngineConfig": "nybble.core.config",
    "RequestOutput": "nybble.core.outputs",
    "SamplingParams": "nybble.core.sampling",
    "StructuredOutputs": "nybble.core.structured",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("nybble.core.errors")
    if name not in HOMES:
        raise AttributeError(f"module 'nybble' has no attribute {name!r}")
    value = getattr(import_module(HOMES[name]), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
