"""`Op`: one mathematical operation, its definition and its implementations; and `bind`, the place where one is chosen.

Owns: which implementation runs (CPU, Triton, CUDA). Does not know: layers, models.

An implementation is chosen once, when a model is built: the user's override, else the first whose `supports(spec)` is
None, else the reference. Nothing is chosen per call, and no import error decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nybble.core.errors import ConfigError
from nybble.core.log import logger

OPERATIONS = (
    "attention",
    "dense_linear",
    "int4_gated",
    "int4_linear",
    "int4_qkv",
    "kv_write",
    "rms_norm",
    "rotary",
    "silu_mul",
)
"""All there are, so that a misspelt name in `EngineConfig.kernels` shows: a model binds only those that it needs."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an implementation must cope with: where it runs, in which type, and the operation's own sizes."""

    device: torch.device
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)  # for instance out_features, in_features, group_size

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability; (0, 0) elsewhere."""
        return torch.cuda.get_device_capability(self.device) if self.device.type == "cuda" else (0, 0)


@dataclass(frozen=True)
class Cost:
    """The least an operation must move and compute; rooflines are drawn from it."""

    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Impl:
    """One way to compute an operation.

    `supports` answers None, or in a few words why not. `prepare` (operations with weights) lays the weights out the way
    `launch` wants them, once, at load time.
    """

    name: str
    supports: Callable[[Spec], str | None]
    launch: Callable[..., Any]
    prepare: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. `reference` *is* its definition; `cases` feeds tests, benchmarks and tuning alike."""

    name: str
    reference: Impl
    impls: tuple[Impl, ...] = ()
    cases: Callable[[], Iterable[Any]]
    cost: Callable[..., Cost]

    @property
    def all_impls(self) -> tuple[Impl, ...]:
        return (*self.impls, self.reference)


def bind(op: Op, spec: Spec, override: Mapping[str, str] | None = None) -> Impl:
    """Choose the implementation of `op` for `spec`.

    Args:
        override: operation name → implementation name, from `EngineConfig.kernels`.

    Raises:
        ConfigError: the override names no operation, no implementation, or one that does not support `spec`.
    """
    override = override or {}
    for name in override:
        if name not in OPERATIONS:
            raise ConfigError(f"kernels: {name!r} is no operation; there are {', '.join(OPERATIONS)}")
    wanted = override.get(op.name)
    if wanted is not None:
        impl = next((i for i in op.all_impls if i.name == wanted), None)
        if impl is None:
            names = ", ".join(i.name for i in op.all_impls)
            raise ConfigError(f"kernels: {op.name} has no implementation {wanted!r}; it has {names}")
        if why_not := impl.supports(spec):
            raise ConfigError(f"kernels: {op.name}={wanted} cannot run here: {why_not}")
    else:
        impl = next((i for i in op.impls if i.supports(spec) is None), op.reference)
    logger.debug("kernel %s → %s (%s, %s, %s)", op.name, impl.name, spec.device, spec.dtype, dict(spec.sizes))
    return impl


def always(_: Spec) -> str | None:
    """`supports` of references: they run anywhere."""
    return None
