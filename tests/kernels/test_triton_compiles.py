"""The Triton kernels compile for the GPUs we name, without one: a target is all the compiler needs.

Shared memory is checked too: 99 KB is what a program gets on the smallest of them (sm_86, sm_89).
"""

import subprocess
import sys
from importlib.util import find_spec

import pytest

SMALLEST_SHARED_MEMORY_BYTES = 99 * 1024

# Runs apart from the tests, because it replaces Triton's driver.
PROGRAM = """
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nybble.kernels.check import OPS
from nybble.kernels.triton import attention, int4_linear


class NoGPU:
    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def compile_only(self, *args, grid=None, warmup=False, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    shared_bytes[self.__name__] = max(shared_bytes.get(self.__name__, 0), kernel.metadata.shared)


driver.set_active(NoGPU())
run, shared_bytes = JITFunction.run, {}
JITFunction.run = compile_only
attention.processors = int4_linear.processors = lambda device: 132
int4_linear.DEQUANTIZE_FROM = 30  # one of the small cases goes this way
for name, op in OPS.items():
    for impl in op.impls:
        for case in op.cases() if impl.name == "triton" else ():
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
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
