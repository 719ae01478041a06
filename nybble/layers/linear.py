"""`Linear`: y = x Wᵀ + b, dense or 4 bit, one checkpoint linear or several side by side (q k v; gate up).

Owns: gathering its stored tensors, the weight in its kernel's layout. Does not know: files, bit layouts, model names.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from nybble.core.errors import UnsupportedError
from nybble.formats import Quantization
from nybble.formats.format import Format, StoredTensor
from nybble.kernels import dense_linear, int4_linear
from nybble.kernels.int4_weight import Int4Weight
from nybble.layers.slot import Slot
from nybble.layers.target import Target


class Linear(nn.Module):
    """Maps [T, in_features] to [T, sum of the parts].

    Args:
        parts: checkpoint name of each part (`q_proj`) → its output features, in the order of the output.
        bias: whether the model's definition has one; a checkpoint may bring one nevertheless.
    """

    def __init__(self, target: Target, in_features: int, parts: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__()
        self.target = target
        self.in_features = in_features
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.has_bias = bias
        self.weight_bytes = 0
        self._raw: dict[str, torch.Tensor] = {}

    def slots(self, path: str, quantization: Quantization, stored: Container[str] | None) -> dict[str, Slot]:
        prefix = path.rpartition(".")[0]
        names = [f"{prefix}.{part}" if prefix else part for part in self.parts]
        formats = [quantization.format_of(name, self.in_features, stored) for name in names]
        if any(other != formats[0] for other in formats):
            found = ", ".join(f"{name}: {fmt.name}" for name, fmt in zip(names, formats, strict=True))
            raise UnsupportedError(f"linears that nybble fuses must be stored in one format; found {found}")
        self._format: Format = formats[0]
        ends = list(accumulate(self.parts.values()))
        return {
            f"{name}.{tensor.name}": self._slot(name, tensor, range(end - size, end))
            for name, size, end in zip(names, self.parts.values(), ends, strict=True)
            for tensor in self._format.tensors(self.in_features, bias=self.has_bias)
        }

    def _slot(self, name: str, tensor: StoredTensor, out: range) -> Slot:
        try:
            shape = tensor.shape(len(out), self.in_features)
            tensor.region(out=out, in_=range(self.in_features))
        except UnsupportedError as error:
            raise UnsupportedError(f"{name}.{error}") from None
        accept = partial(self._accept, tensor, out)
        return Slot(shape=shape, dtypes=tensor.dtypes, accept=accept, random=tensor.random, optional=tensor.optional)

    def _accept(self, tensor: StoredTensor, out: range, value: torch.Tensor) -> None:
        """Put one part's stored tensor in its place; floats are cast to the compute type here."""
        dtype = self.target.dtype if value.is_floating_point() else value.dtype
        if len(self.parts) == 1:
            self._raw[tensor.name] = value.to(dtype)
            return
        if tensor.name not in self._raw:
            shape = tensor.shape(self.out_features, self.in_features)
            # Zeros, because a part may lack an optional bias.
            self._raw[tensor.name] = torch.zeros(shape, dtype=dtype, device=value.device)
        self._raw[tensor.name][tensor.region(out=out, in_=range(self.in_features))] = value

    def finish(self) -> None:
        bias = self._raw.pop("bias", None)
        if bias is not None and not self.has_bias and not bias.any():
            bias = None
        weight = self._format.repack(self._raw, self.target.dtype)
        self._raw.clear()
        if isinstance(weight, Int4Weight):
            self.weight_bytes = weight.qweight.nbytes + weight.scales.nbytes + weight.zeros.nbytes
        else:
            self.weight_bytes = weight.nbytes
        self.weight_bytes += 0 if bias is None else bias.nbytes
        self._bias = bias
        self._bind(weight)

    def _bind(self, weight: Int4Weight | torch.Tensor) -> None:
        sizes = {"out_features": self.out_features, "in_features": self.in_features}
        if isinstance(weight, Int4Weight):
            impl = self.target.bind(int4_linear.OP, **sizes, group_size=weight.group_size)
        else:
            impl = self.target.bind(dense_linear.OP, **sizes)
        assert impl.prepare is not None, f"{impl.name} has no prepare"
        self._multiply, self._weight = impl.launch, impl.prepare(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._multiply(x, self._weight, self._bias)
