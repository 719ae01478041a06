"""`Slot`: one checkpoint tensor a layer waits for. The loader knows slots, not layers; layers know no files."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Protocol

import torch

from nybble.formats import Quantization
from nybble.formats.format import RandomFill


@dataclass(frozen=True, kw_only=True)
class Slot:
    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]  # accepted in the file
    accept: Callable[[torch.Tensor], object]  # takes the tensor as stored, on the layer's device
    random: RandomFill  # what `load_format="dummy"` puts in
    optional: bool = False


class Loadable(Protocol):
    """A layer with weights."""

    def slots(self, path: str, quantization: Quantization, stored: Container[str] | None) -> dict[str, Slot]:
        """What this layer, found at `path` in the model, takes: checkpoint name → slot.

        Args:
            stored: the names in the checkpoint; None for dummy weights.
        """
        ...

    def finish(self) -> None:
        """All slots that will be filled are: make the layer ready, free what is no longer needed."""
        ...
