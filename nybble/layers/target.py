"""`Target`: where a model is built. It binds each operation once and remembers what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nybble.kernels.op import Impl, Op, Spec, bind


@dataclass(frozen=True, kw_only=True)
class Target:
    device: torch.device
    dtype: torch.dtype  # activations and KV cache
    kernels: Mapping[str, str] = field(default_factory=dict)  # forced implementations: operation → name
    chosen: dict[str, set[str]] = field(default_factory=dict)  # operation → implementations in use

    def bind(self, op: Op, **sizes: int) -> Impl:
        """Choose the implementation of `op` for these sizes.

        Raises:
            ConfigError: a forced implementation does not exist or cannot run here.
        """
        impl = self._choose(op, sizes)
        self.chosen.setdefault(op.name, set()).add(impl.name)
        return impl

    def find(self, op: Op, **sizes: int) -> Impl | None:
        """The same for an operation that others can stand in for: None where only its reference would run."""
        impl = self._choose(op, sizes)
        if impl is op.reference:
            return None
        self.chosen.setdefault(op.name, set()).add(impl.name)
        return impl

    def _choose(self, op: Op, sizes: Mapping[str, int]) -> Impl:
        return bind(op, Spec(device=self.device, dtype=self.dtype, sizes=sizes), self.kernels)
