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
        impl = bind(op, Spec(device=self.device, dtype=self.dtype, sizes=sizes), self.kernels)
        self.chosen.setdefault(op.name, set()).add(impl.name)
        return impl
