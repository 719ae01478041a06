"""The Triton kernels compile for the GPUs we name, without one: a target is all the compiler needs.

Shared memory is checked too: 99 KB is what a program gets on the smallest of them (sm_86, sm_89).
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest

SMALLEST_SHARED_MEMORY_BYTES = 99 * 1024

# Runs apart from the tests, because it replaces Triton's driver. A variant takes about a second to compile, so the slow
# kernels have a few that stand for all: each type, each tile, and whatever is special-cased. On sm_90 only the tensor
# cores are programmed in another way, and those compute in 16 bit.
PROGRAM = """
import itertools
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nybble.kernels.attention import Case as Attention
from nybble.kernels.check import OPS
from nybble.kernels.int4_linear import Case as Int4Linear
from nybble.kernels.triton import attention, int4_linear, overlap


class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def compile_only(self, *args, grid=None, warmup=False, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    shared_bytes[self.__name__] = max(shared_bytes.get(self.__name__, 0), kernel.metadata.shared)


capability = int(sys.argv[1])
driver.set_active(NoGPU())
run, shared_bytes = JITFunction.run, {}
JITFunction.run = compile_only
overlap.is_available = lambda device: capability >= 90
attention.processors = int4_linear.processors = lambda device: 132

fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
mixed = (9, 1), (30, 300)  # a prefill and a decode whose keys are split
CASES = {
    "attention": (
        (Attention(*mixed, 5, 1, 128), fp16),
        (Attention(*mixed, 2, 2, 256, 32, sliding_window=13), bf16),
        (Attention(*mixed, 6, 2, 64), fp32),
        (Attention(*mixed, 5, 1, 200), fp32),  # in tiles of 256
    ),
    "int4_linear": (
        (Int4Linear(1, 512, 136, 128, has_bias=True), fp16),
        (Int4Linear(64, 160, 264, 32), bf16),
        (Int4Linear(3, 256, 136, 64), fp32),
        (Int4Linear(int4_linear.DEQUANTIZE_FROM, 160, 264, 32), fp16),
    ),
}
for name, op in OPS.items():
    for impl in op.impls:
        for case, dtype in CASES.get(name) or zip(op.cases(), itertools.cycle((fp16, bf16, fp32))):
            if impl.name != "triton" or (capability == 90 and dtype == fp32):
                continue
            arguments = case.arguments(torch.device("cpu"), dtype, torch.Generator())
            if impl.prepare is not None:
                arguments["weight"] = impl.prepare(arguments["weight"])
            impl.launch(*arguments.values())
for kernel, size in shared_bytes.items():
    print("kernel", kernel, size)
"""

KERNELS = {
    "decode_kernel",
    "dequantize_kernel",
    "int4_linear_kernel",
    "join_kernel",
    "kv_write_kernel",
    "prefill_kernel",
    "rms_norm_kernel",
    "rotary_kernel",
    "silu_mul_kernel",
    "sum_parts_kernel",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles(capability, tmp_path, monkeypatch):
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(capability)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("kernel ")]
    assert {name for name, _ in lines} == KERNELS
    for name, size in lines:
        assert int(size) <= SMALLEST_SHARED_MEMORY_BYTES, (name, size)
