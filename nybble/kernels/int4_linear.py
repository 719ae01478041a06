"""y = x · Wᵀ + bias with a 4-bit W.

    x [M, K], W [N, K] as an `Int4Weight` with groups of g along K, bias [N] or None → y [M, N] in x's dtype
    bytes: N·K/2 codes + N·K/g scales and half-byte zeros + (M·K + M·N) activations;  flops: 2·M·N·K

The reference rounds W to x's dtype and multiplies; implementations may keep more of W, never less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nybble.kernels import triton
from nybble.kernels.cpu import int4_linear as cpu
from nybble.kernels.cuda import packed, w4a16, w4a16_wgmma
from nybble.kernels.int4_weight import Int4Weight, random_int4_weight
from nybble.kernels.op import Cost, Impl, Op, Spec, always


def reference(x: torch.Tensor, weight: Int4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight.dequantize(x.dtype), bias)


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    out_features: int
    group_size: int
    symmetric: bool = False
    has_bias: bool = False
    has_outliers: bool = False  # a few activations 100 times the rest: shows cancellation in zero-point tricks

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        """What `launch` takes; the weight still has to go through `prepare`."""
        x = torch.randn(self.tokens, self.in_features, generator=generator, device=device)
        if self.has_outliers:
            x[:, :: max(1, self.in_features // 5)] *= 100
        weight = random_int4_weight(
            self.out_features,
            self.in_features,
            self.group_size,
            dtype,
            device=device,
            generator=generator,
            symmetric=self.symmetric,
        )
        bias = torch.randn(self.out_features, generator=generator, device=device) if self.has_bias else None
        return {"x": x.to(dtype), "weight": weight, "bias": None if bias is None else bias.to(dtype)}


def cases(large: bool = False) -> Iterator[Case]:
    """Small odd ones; `large` adds the shapes of real models."""
    yield Case(1, 128, 64, 32)
    yield Case(1, 256, 136, 128, has_bias=True)
    yield Case(3, 384, 72, 64, has_outliers=True)
    yield Case(5, 896, 128, 128, symmetric=True)
    yield Case(17, 256, 200, 128, has_bias=True, has_outliers=True)
    yield Case(33, 160, 264, 32)
    if large:
        yield from model_cases()


# (K, N) of qkv, o, gate_up and down.
MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "qwen2.5-0.5b": ((896, 1152), (896, 896), (896, 9728), (4864, 896)),
    "qwen2.5-1.5b": ((1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536)),
    "qwen2.5-7b": ((3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584)),
    "qwen2.5-32b": ((5120, 7168), (5120, 5120), (5120, 55296), (27648, 5120)),
    "qwen2.5-72b": ((8192, 10240), (8192, 8192), (8192, 59136), (29568, 8192)),
}


def model_cases() -> Iterator[Case]:
    for shapes in MODEL_SHAPES.values():
        for k, n in shapes:
            group_size = 128 if k % 128 == 0 else 64
            for tokens in (1, 7, 16, 64, 200, 1000):
                yield Case(tokens, k, n, group_size, has_bias=tokens % 2 == 1, has_outliers=tokens == 7)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    m, k, n = case.tokens, case.in_features, case.out_features
    groups = k // case.group_size
    weight_bytes = n * k // 2 + groups * n * dtype.itemsize + groups * n // 2
    return Cost(weight_bytes + (m * k + m * n) * dtype.itemsize, 2 * m * n * k)


def triton_why_not(spec: Spec) -> str | None:
    group_size = spec.sizes["group_size"]
    if group_size not in (32, 64) and group_size % 128:
        return f"groups must be 32, 64 or a multiple of 128, not {group_size}"
    return triton.why_not(spec)


TRITON = Impl(
    name="triton",
    supports=triton_why_not,
    prepare=triton.deferred("int4_linear", "prepare"),
    launch=triton.deferred("int4_linear"),
)

WGMMA = Impl(name="wgmma", supports=w4a16_wgmma.supports, prepare=w4a16_wgmma.prepare, launch=w4a16_wgmma.launch)
MMA = Impl(name="mma", supports=packed.supports, prepare=w4a16.prepare, launch=w4a16.launch)
C = Impl(name="c", supports=cpu.c_why_not, prepare=cpu.c_prepare, launch=cpu.c_launch)
TORCH = Impl(name="torch", supports=cpu.torch_why_not, prepare=cpu.torch_prepare, launch=cpu.torch_launch)

OP = Op(
    name="int4_linear",
    reference=Impl(name="reference", supports=always, prepare=lambda weight: weight, launch=reference),
    impls=(WGMMA, MMA, TRITON, C, TORCH),
    cases=cases,
    cost=cost,
)
