"""Which class runs which architecture. Adding a family is one file and one line here."""

from __future__ import annotations

from nybble.core.errors import ModelError, UnsupportedError
from nybble.models.config import HfConfig
from nybble.models.decoder import CausalLM
from nybble.models.llama import LlamaForCausalLM
from nybble.models.mistral import MistralForCausalLM
from nybble.models.qwen2 import Qwen2ForCausalLM
from nybble.models.qwen3 import Qwen3ForCausalLM

FAMILIES: dict[str, type[CausalLM]] = {
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
}
"""`model_type` of config.json → class; the class's name is the only architecture accepted."""


def family_of(hf: HfConfig) -> type[CausalLM]:
    """The class for this config.json.

    Raises:
        UnsupportedError: another architecture, or one that exists only as code in the checkpoint.
        ModelError: `architectures` is nonsense.
    """
    model_type, architectures = hf.get("model_type"), hf.get("architectures") or []
    if not isinstance(architectures, list):
        raise ModelError(f"config.json: architectures must be a list of names, got {architectures!r}")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None and (not architectures or family.__name__ in architectures):
        return family
    accepted = ", ".join(f.__name__ for f in FAMILIES.values())
    message = f"config.json: model_type {model_type!r}, architectures {architectures!r} is not supported; "
    if hf.get("auto_map"):
        message += "its code lies in the checkpoint (auto_map), and nybble never runs remote code; "
    raise UnsupportedError(f"{message}accepted are {accepted}")
