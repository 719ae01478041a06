"""Mistral 7B and its kin (Jiang et al. 2023): Llama's attention, looking back over a sliding window in every layer."""

from __future__ import annotations

from nybble.models.config import DecoderConfig, HfConfig, positive, read_decoder
from nybble.models.decoder import CausalLM
from nybble.models.llama import LlamaAttention


class MistralForCausalLM(CausalLM):
    attention = LlamaAttention

    @staticmethod
    def read_config(hf: HfConfig) -> DecoderConfig:
        # A missing field means 4096, as in the first release; a null one means no window.
        window = positive(hf, "sliding_window", 4096) if hf.get("sliding_window", 4096) is not None else None
        return read_decoder(hf, sliding_windows=(window,) * positive(hf, "num_hidden_layers"))
