"""Does an implementation compute what its operation's reference says? One case, one number.

The reference runs in float64 on the very inputs that the implementation gets. Memory that a launch
allocates is filled with NaN first, so an element that nobody writes shows. Run as a program it checks every
implementation that supports this machine:

    python -m nybble.kernels.check [--small] [operation …]
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from nybble.kernels import (
    attention,
    dense_linear,
    int4_gated,
    int4_linear,
    int4_qkv,
    kv_write,
    rms_norm,
    rotary,
    silu_mul,
)
from nybble.kernels.int4_weight import Int4Weight
from nybble.kernels.op import Impl, Spec

MODULES = (attention, dense_linear, int4_gated, int4_linear, int4_qkv, kv_write, rms_norm, rotary, silu_mul)
OPS = {module.OP.name: module.OP for module in MODULES}

# Largest ‖result − reference‖ / ‖reference‖.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5}


def measure(op_name: str, impl_name: str, case: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> float:
    """The largest relative error among what `launch` returns and the tensors it was given.

    Arguments count too: operations in place change some, and none may change the others.
    """
    op = OPS[op_name]
    impl = next(impl for impl in op.all_impls if impl.name == impl_name)
    arguments = case.arguments(device, dtype, torch.Generator(device).manual_seed(seed))
    exact = {name: to_float64(value) for name, value in arguments.items()}
    prepare(impl, case, arguments)
    with poisoned_memory():
        result = impl.launch(*arguments.values())
    expected = op.reference.launch(*exact.values())
    pairs = [*zip(as_tuple(result), as_tuple(expected), strict=True)]
    pairs += [(arguments[name], exact[name]) for name in arguments]
    return max(relative_error(a, b) for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor))


def prepare(impl: Impl, case: Any, arguments: dict[str, Any]) -> None:
    """Lay out the weight among the arguments, if there is one, for `impl`."""
    if impl.prepare is not None:
        arguments["weight"] = impl.prepare(arguments["weight"], **getattr(case, "layout", {}))


def to_float64(value: Any) -> Any:
    """A copy, its floating-point tensors widened."""
    if isinstance(value, Int4Weight):
        return replace(value, scales=value.scales.double())
    if not isinstance(value, torch.Tensor):
        return value
    return value.double() if value.is_floating_point() else value.clone()


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """‖result − expected‖ / ‖expected‖; infinite where only one of them is NaN."""
    result, expected = result.double(), expected.double()  # arguments may be integers
    assert result.shape == expected.shape, (result.shape, expected.shape)
    if not torch.equal(result.isnan(), expected.isnan()):
        return float("inf")
    difference = (result.nan_to_num() - expected.nan_to_num()).norm().item()
    return difference / max(expected.nan_to_num().norm().item(), 1e-30)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch.empty gives NaN (and the largest integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that cuBLAS wants a workspace setting does not matter here
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def sizes_of(case: Any) -> dict[str, int]:
    """What a `Spec` says of a case."""
    return {name: value for name, value in vars(case).items() if isinstance(value, int)} | getattr(case, "layout", {})


def supported(op_name: str, case: Any, dtype: torch.dtype, device: torch.device) -> list[Impl]:
    """The implementations, besides the reference, that take this case here."""
    spec = Spec(device=device, dtype=dtype, sizes=sizes_of(case))
    return [impl for impl in OPS[op_name].impls if impl.supports(spec) is None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the kernels against their references.")
    parser.add_argument("operations", nargs="*", metavar="operation", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--small", action="store_true", help="leave out the sizes of real models")
    options = parser.parse_args()
    if unknown := set(options.operations) - set(OPS):
        parser.error(f"no operation {', '.join(sorted(unknown))}; there are {', '.join(OPS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failures = 0
    for name in options.operations or OPS:
        for case in OPS[name].cases(not options.small):
            for dtype, tolerance in TOLERANCE.items():
                for impl in supported(name, case, dtype, device):
                    error = measure(name, impl.name, case, dtype, device)
                    failures += not error <= tolerance
                    verdict = "ok" if error <= tolerance else "WRONG"
                    print(f"{verdict:5} {error:.1e} {name}={impl.name} {str(dtype)[6:]} {case}", flush=True)
    raise SystemExit(f"{failures} wrong" if failures else 0)


if __name__ == "__main__":
    main()
