"""`Ceilings`: how fast this machine reads memory and multiplies, measured: what shares of a roofline are shares of.

    read_bytes_per_second = bytes of a buffer far larger than the caches / time of reading it once
    flops_per_second = 2·n³ / time of an n × n by n × n product

A CPU has no one rate of arithmetic: the instructions that a library uses decide. There the ceiling is the fastest of
torch's products, in fp32 and in the engine's type, and nybble's own of 4 bits; else a step could outrun its roofline.

The median of ten times on a GPU, which is nybble's alone; the least of many on a CPU, which others only ever slow.

Reading alone, as decoding reads weights: a copy is slower. Measure them in the run whose figures they are to judge, for
clocks, power limits and neighbours change. The memory that it takes is free again afterwards.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from nybble.kernels import int4_linear, triton
from nybble.kernels.check import prepare, sizes_of
from nybble.kernels.op import Cost, Spec, bind

GPU_READ_BYTES = 4 << 30
CPU_READ_BYTES = 512 << 20
PROGRAMS_PER_PROCESSOR = (4, 8)  # 528 and 1056 on an H200; the better one counts
GPU_MATMUL_SIZE = 8192
CPU_MATMUL_SIZE = 1536
INT4_GROUP = 128
REPEATS = 10  # on a GPU
CPU_SECONDS = 1.0  # for each of up to four: long enough to meet a moment when neighbours are quiet
PATTERN = 1 << 20  # random elements that a buffer repeats: what is read does not matter, as long as it is no constant


@dataclass(frozen=True)
class Ceilings:
    read_bytes_per_second: float
    flops_per_second: float
    dtype: str  # that was multiplied
    how: str
    int4_flops_per_second: float | None = None  # of nybble's own 4-bit product, on a CPU

    def seconds(self, cost: Cost) -> float:
        """The roofline: the least time in which so much can be read and computed."""
        return max(cost.bytes / self.read_bytes_per_second, cost.flops / self.flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Takes a second, on a CPU up to four, and 4 GiB of a GPU's memory or an eighth of what is free, whichever is less.

    Args:
        dtype: that an engine computes in: of the matrices.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            ceilings = _measure_gpu(device, dtype)
            torch.cuda.empty_cache()
        return ceilings
    return _measure_cpu(dtype)


def _measure_gpu(device: torch.device, dtype: torch.dtype) -> Ceilings:
    free_bytes, _ = torch.cuda.mem_get_info(device)
    source = _buffer(min(GPU_READ_BYTES, free_bytes // 8), device)
    seconds, who = min(_read_times(source, device))
    read = source.nbytes / seconds
    text = f"{source.nbytes / 1e9:.2f} GB read once by {who}"
    del source
    n = GPU_MATMUL_SIZE
    flops = 2 * n**3 / median_seconds(_product(n, dtype, device), device)
    return Ceilings(read, flops, _name(dtype), f"{text}; {n}³ product in {_name(dtype)}; medians of {REPEATS}")


def _read_times(source: torch.Tensor, device: torch.device) -> list[tuple[float, str]]:
    """Seconds of one sweep, and what swept: the kernel that only reads, or torch's sum where Triton cannot compile."""
    if triton.missing_tools() is not None:
        return [(median_seconds(lambda: source.sum(), device), "torch's sum")]
    from nybble.kernels.triton.read import read

    times = []
    for each in PROGRAMS_PER_PROCESSOR:
        num_programs = each * torch.cuda.get_device_properties(device).multi_processor_count
        sums = torch.empty(num_programs, dtype=torch.int32, device=device)
        times.append((median_seconds(partial(read, source, sums), device), f"{num_programs} programs"))
    return times


def _measure_cpu(dtype: torch.dtype) -> Ceilings:
    device = torch.device("cpu")
    source = _buffer(CPU_READ_BYTES, device).view(torch.float32)  # sums of floats use the widest loads
    read = source.nbytes / _least_seconds(lambda: source.sum())
    n = CPU_MATMUL_SIZE
    types = list(dict.fromkeys((torch.float32, dtype)))
    products = {("torch's", each): _product(n, each, device) for each in types}
    products["nybble's int4", dtype] = _int4_product(n, dtype, device)
    rates = {name: 2 * n**3 / _least_seconds(product) for name, product in products.items()}
    (fastest, fastest_dtype), *others = sorted(rates, key=lambda name: -rates[name])
    flops = rates[fastest, fastest_dtype]
    slower = ", ".join(f"{who} in {_name(each)} {rates[who, each] / 1e12:.3g} TFLOP/s" for who, each in others)
    how = (
        f"{source.nbytes / 1e9:.2f} GB summed by {torch.get_num_threads()} threads; the fastest {n}³ product, "
        f"{fastest} in {_name(fastest_dtype)} (slower: {slower}); best of {CPU_SECONDS:g} s each"
    )
    return Ceilings(read, flops, _name(fastest_dtype), how, rates["nybble's int4", dtype])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """int32 in a whole number of PATTERNs; read as floats they are finite and positive."""
    pattern = torch.randint(1 << 23, 1 << 30, (PATTERN,), dtype=torch.int32, device=device)
    return pattern.repeat(max(1, num_bytes // pattern.nbytes))


def _product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _int4_product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """By the kernel that a model would bind."""
    case = int4_linear.Case(n, n, n, INT4_GROUP)
    impl = bind(int4_linear.OP, Spec(device=device, dtype=dtype, sizes=sizes_of(case)))
    arguments = case.arguments(device, dtype, torch.Generator(device).manual_seed(0))
    prepare(impl, case, arguments)
    return partial(impl.launch, *arguments.values())


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of REPEATS calls on a GPU after two that do not count; between events, so for calls of at least 100 µs."""
    for _ in range(2):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return float(statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))) / 1e3


def _least_seconds(call: Callable[[], object]) -> float:
    """Of calls for CPU_SECONDS, three at least."""
    times: list[float] = []
    while sum(times) < CPU_SECONDS or len(times) < 3:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
