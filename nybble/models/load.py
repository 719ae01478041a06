"""`load_model`: from a checkpoint to a model that is ready to run.

All names, shapes and types are checked against the files' headers before a byte of weights is read. Then tensors stream
in file by file; a layer is finished (repacked for its kernel, raw tensors freed) the moment its last one arrives. Host
memory beyond the model itself is bounded by the pinned buffers on a GPU, by the layer in hand on a CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import cast

import torch

from nybble import formats
from nybble.core.errors import ModelError, UnsupportedError
from nybble.formats.format import FLOAT_TYPES
from nybble.layers.slot import Loadable, Slot
from nybble.layers.target import Target
from nybble.models.checkpoint import INDEX, Checkpoint
from nybble.models.config import DecoderConfig
from nybble.models.decoder import CausalLM
from nybble.models.registry import family_of
from nybble.models.safetensors_file import Entry, SafetensorsFile, TensorReader

HARMLESS_ENDING = ".rotary_emb.inv_freq"  # old exports keep the rotary frequencies; they follow from config.json


@torch.no_grad()
def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "safetensors",
    kernels: Mapping[str, str] | None = None,
    max_model_len: int | None = None,
) -> CausalLM:
    """Build the model and fill it.

    Args:
        dtype: compute type: float16, bfloat16 or float32; float weights are cast to it.
        load_format: "safetensors", or "dummy" for random weights of the right shapes (the same ones each time).
        kernels: forced implementations, operation → name.
        max_model_len: positions to prepare for; None: all that the model has.

    Raises:
        ModelError: a file or tensor is missing, damaged, left over, or of another shape or type; names it.
        UnsupportedError: a sound checkpoint of a kind that nybble does not run.
        ConfigError: a forced kernel does not exist or cannot run here.
    """
    family = family_of(checkpoint.hf)
    quantization = formats.from_hf(checkpoint.hf)
    config = family.read_config(checkpoint.hf)
    target = Target(device=device, dtype=dtype, kernels=kernels or {})
    if load_format == "dummy":
        model = family(target, config, max_model_len)
        layers = Layers(model, quantization, None)
        for name, slot in layers.slots.items():
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            layers.fill(name, slot.random(slot.shape, generator))
    else:
        with open_files(checkpoint) as files:
            stored = _entries(files)
            _check_size(config, stored)
            model = family(target, config, max_model_len)
            _stream(model, quantization, files, stored)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the repacks' temporaries
    return model.eval().requires_grad_(False)


class Layers:
    """The layers of a model that wait for weights. Each is finished when the last of its expected tensors is there."""

    def __init__(self, model: CausalLM, quantization: formats.Quantization, stored: Mapping[str, Entry] | None) -> None:
        self.slots: dict[str, Slot] = {}
        self._layer_of: dict[str, Loadable] = {}
        self._waiting: dict[Loadable, int] = {}
        for path, module in model.named_modules():
            if not hasattr(module, "slots"):
                continue
            layer = cast(Loadable, module)
            slots = layer.slots(path, quantization, stored)
            if stored is None:
                # Dummy weights leave out what is there only for odd files.
                expected = {name: slot for name, slot in slots.items() if not slot.optional}
            else:
                expected = {name: slot for name, slot in slots.items() if name in stored or not slot.optional}
            self.slots |= expected
            self._layer_of |= dict.fromkeys(expected, layer)
            self._waiting[layer] = len(expected)

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        layer = self._layer_of.pop(name)  # a KeyError here would mean that a tensor came twice
        try:
            self.slots[name].accept(tensor)
            self._waiting[layer] -= 1
            if self._waiting[layer] == 0:
                layer.finish()
        except UnsupportedError as error:
            raise UnsupportedError(f"{name.rpartition('.')[0]}: {error}") from error


@contextmanager
def open_files(checkpoint: Checkpoint) -> Iterator[list[SafetensorsFile]]:
    """The weight files, headers checked, and checked against the index."""
    files: list[SafetensorsFile] = []
    try:
        for path in checkpoint.weight_files:
            files.append(SafetensorsFile(path))  # one by one, so that a failure closes those before
        for name, path in (checkpoint.weight_map or {}).items():
            if not any(file.path == path and name in file.entries for file in files):
                raise ModelError(f"{path}: {name} is not in this file, although {INDEX} says so")
        yield files
    finally:
        for file in files:
            file.close()


def _entries(files: list[SafetensorsFile]) -> dict[str, Entry]:
    stored: dict[str, Entry] = {}
    for file in files:
        if twice := stored.keys() & file.entries.keys():
            raise ModelError(f"{file.path}: {min(twice)} is also in another file of the model")
        stored |= file.entries
    return stored


def _check_size(config: DecoderConfig, stored: Mapping[str, Entry]) -> None:
    """Before anything is allocated: the files hold as many layers, and as large a vocabulary, as config.json says."""
    embedding, last = "model.embed_tokens.weight", f"model.layers.{config.num_layers - 1}.input_layernorm.weight"
    shapes = {embedding: (config.vocab_size, config.hidden_size), last: (config.hidden_size,)}
    for name, shape in shapes.items():
        _check_tensor(name, stored, shape, FLOAT_TYPES)


def _stream(
    model: CausalLM, quantization: formats.Quantization, files: list[SafetensorsFile], stored: Mapping[str, Entry]
) -> None:
    layers = Layers(model, quantization, stored)
    _check(layers.slots, stored, tied=model.config.tie_word_embeddings)
    with closing(TensorReader(model.target.device)) as reader:
        for file in files:
            for name, entry in sorted(file.entries.items(), key=lambda item: item[1].start):
                if name in layers.slots:
                    layers.fill(name, reader.read(file, entry))


def _check(slots: Mapping[str, Slot], stored: Mapping[str, Entry], *, tied: bool) -> None:
    """Every slot has its tensor, of the right kind, and no tensor is left over."""
    for name, slot in slots.items():
        _check_tensor(name, stored, slot.shape, slot.dtypes)
    extra = sorted(
        name
        for name in stored.keys() - slots.keys()
        if not name.endswith(HARMLESS_ENDING) and not (tied and name.startswith("lm_head."))
    )
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ModelError(f"the checkpoint has {extra[0]}{more}, which this model has no place for")


def _check_tensor(
    name: str, stored: Mapping[str, Entry], shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    wanted = f"{list(shape)} {'/'.join(_type_name(dtype) for dtype in dtypes)}"
    if name not in stored:
        raise ModelError(f"the checkpoint lacks {name}, which config.json calls for: {wanted}")
    entry = stored[name]
    if entry.shape != shape or entry.dtype not in dtypes:
        found = f"{list(entry.shape)} {_type_name(entry.dtype)}"
        raise ModelError(f"{name} is {found} in the checkpoint; config.json calls for {wanted}")


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
