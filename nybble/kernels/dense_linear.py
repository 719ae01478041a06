"""y = x · Wᵀ + bias with a 16- or 32-bit W.

    x [M, K], W [N, K], bias [N] or None → y [M, N];  bytes: (N·K + M·K + M·N)·itemsize;  flops: 2·M·N·K

Torch's own product is the definition and, on GPUs and on CPUs with bf16 arithmetic, the implementation. Other CPUs run
it several times slower than memory allows; there FBGEMM's fp16-weight product is used, which comes with torch and sums
in fp32. bf16 weights become fp16 exactly between 2⁻¹⁴ and 65504; smaller ones lose at most 2⁻²⁵.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nybble.kernels.op import Cost, Impl, Op, Spec, always

CHUNK = 16384  # output rows packed at once: FBGEMM wants an fp32 copy
LARGEST_FP16 = 65504.0


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, weight, bias)


def fbgemm_why_not(spec: Spec) -> str | None:
    if spec.device.type != "cpu" or spec.dtype not in (torch.bfloat16, torch.float16):
        return "FBGEMM's fp16-weight product is for bf16 and fp16 on CPUs"
    if spec.dtype == torch.bfloat16 and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "this CPU has bf16 arithmetic, which torch's own product uses"
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return f"this torch has no FBGEMM (its engine is {torch.backends.quantized.engine})"
    return None


def fbgemm_prepare(weight: torch.Tensor) -> list[Any]:
    """FBGEMM's handles of consecutive chunks of output rows, or the weight itself where fp16 cannot hold it."""
    if weight.abs().amax() > LARGEST_FP16:
        return [weight]
    return [torch.ops.quantized.linear_prepack_fp16(part.float(), None) for part in weight.split(CHUNK)]


def fbgemm_launch(x: torch.Tensor, weight: list[Any], bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(weight[0], torch.Tensor):
        return F.linear(x, weight[0], bias)
    wide = x.float()
    parts = [torch.ops.quantized.linear_dynamic_fp16(wide, part) for part in weight]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (y if bias is None else y.add_(bias)).to(x.dtype)


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    out_features: int
    has_bias: bool = False

    def arguments(self, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        weight = normal(self.out_features, self.in_features) / self.in_features**0.5
        bias = normal(self.out_features).to(dtype) if self.has_bias else None
        return {"x": normal(self.tokens, self.in_features).to(dtype), "weight": weight.to(dtype), "bias": bias}


def cases(large: bool = False) -> Iterator[Case]:
    yield Case(1, 128, 64)
    yield Case(3, 200, 37, has_bias=True)
    yield Case(20, 64, CHUNK + 5)
    if large:
        for tokens in (1, 16, 256):
            yield Case(tokens, 896, 151936)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    m, k, n = case.tokens, case.in_features, case.out_features
    return Cost((n * k + m * k + m * n) * dtype.itemsize, 2 * m * n * k)


OP = Op(
    name="dense_linear",
    reference=Impl(name="reference", supports=always, prepare=lambda weight: weight, launch=reference),
    impls=(Impl(name="fbgemm", supports=fbgemm_why_not, prepare=fbgemm_prepare, launch=fbgemm_launch),),
    cases=cases,
    cost=cost,
)
