"""`Machine`: what a device can read and compute in a second. A table of known ones, for rooflines without the device.

The table holds data-sheet rates (dense, 16 bit with fp32 sums) and the memory that the driver shows. A program reaches
a part of the rates: on an H200 a plain read kernel 96 % of the bandwidth and cuBLAS 80 % of the arithmetic, on an H100
88 % and 80 %. `Machine.sustained` applies such shares, so that a floor is one that a real kernel can come near to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from nybble.core.errors import ConfigError

READ_SHARE = 0.92
MATH_SHARE = 0.80
LINK_SHARE = 0.80
FASTEST_PCIE_GB = 50
"""A second, one way, of version 5 with 16 lanes; what is faster is NVLink."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One device; rates are per second. `link`: from one device to the others of the machine, one way."""

    name: str
    memory_bytes: float
    read_bytes_per_second: float
    flops_per_second: float  # of 16-bit matrix products
    integer_ops_per_second: float | None = None  # 32-bit lanes: what turns 4-bit codes into numbers
    link_bytes_per_second: float | None = None
    link_seconds: float = 0.0  # the least that one all-reduce takes
    is_measured: bool = False
    how: str = ""  # the rates were measured
    int4_flops_per_second: float | None = None  # of nybble's own 4-bit product, which a CPU is slower at; None: a GPU

    def sustained(self) -> Machine:
        """With the shares of the data sheet's rates that programs reach; measured rates stay."""
        if self.is_measured:
            return self
        return replace(
            self,
            read_bytes_per_second=self.read_bytes_per_second * READ_SHARE,
            flops_per_second=self.flops_per_second * MATH_SHARE,
            link_bytes_per_second=None
            if self.link_bytes_per_second is None
            else self.link_bytes_per_second * LINK_SHARE,
        )


def _gpu(
    name: str, memory_mib: int, read_tb: float, tflops: float, units: int, lanes: int, ghz: float, link_gb: float
) -> Machine:
    return Machine(
        name=name,
        memory_bytes=memory_mib * 2**20,
        read_bytes_per_second=read_tb * 1e12,
        flops_per_second=tflops * 1e12,
        integer_ops_per_second=units * lanes * ghz * 1e9,
        link_bytes_per_second=link_gb * 1e9,
        link_seconds=_link_seconds(link_gb),
    )


def _link_seconds(link_gb: float) -> float:
    """One-shot all-reduces over NVLink take some 8 µs; over PCIe, where data goes through the host, some 25."""
    return 8e-6 if link_gb > FASTEST_PCIE_GB else 25e-6


MACHINES = (
    #    name                MiB  read   math  SMs lanes GHz   link one way (NVLink, else PCIe x16)
    _gpu("B200",            183359, 8.0,   2250, 148, 128, 1.96, 900),
    _gpu("H200",            143771, 4.8,    989, 132, 64, 1.98, 450),
    _gpu("H100",             81559, 3.35,   989, 132, 64, 1.98, 450),
    _gpu("H100 PCIe",        81559, 2.04,   756, 114, 64, 1.755, 50),
    _gpu("H20",              97871, 4.0,    148, 78, 64, 1.98, 450),
    _gpu("A100 80GB",        81920, 2.04,   312, 108, 64, 1.41, 300),
    _gpu("A100 80GB PCIe",   81920, 1.935,  312, 108, 64, 1.41, 25),
    _gpu("A100 40GB",        40960, 1.555,  312, 108, 64, 1.41, 300),
    _gpu("A100 40GB PCIe",   40960, 1.555,  312, 108, 64, 1.41, 25),
    _gpu("L40S",             46068, 0.864,  362, 142, 64, 2.52, 25),
    _gpu("L4",               23034, 0.300,  121, 58, 64, 2.04, 25),
    _gpu("A10",              23028, 0.600,  125, 72, 64, 1.695, 25),
    _gpu("RTX A6000",        49140, 0.768,  155, 84, 64, 1.80, 25),
    _gpu("RTX 6000 Ada",     49140, 0.960,  364, 142, 64, 2.505, 25),
    _gpu("RTX 5090",         32607, 1.792,  210, 170, 128, 2.41, 50),
    _gpu("RTX 4090",         24564, 1.008,  165, 128, 64, 2.52, 25),
    _gpu("RTX 3090",         24576, 0.936,   71, 82, 64, 1.695, 25),
)  # fmt: skip
ALIASES = {
    "a100": "a10080gb",
    "a100sxm480gb": "a10080gb",
    "a100sxm440gb": "a10040gb",
    "a100pcie40gb": "a10040gbpcie",
    "h100sxm": "h100",
    "h10080gbhbm3": "h100",
    "h200sxm": "h200",
    "rtx6000adageneration": "rtx6000ada",
}


def find_machine(name: str) -> Machine:
    """The table's entry of this name, as people or drivers write it ("RTX 3090", "NVIDIA H100 80GB HBM3").

    Raises:
        ConfigError: there is none.
    """
    found = in_table(name)
    if found is not None:
        return found
    known = ", ".join(machine.name for machine in MACHINES)
    raise ConfigError(
        f"--device {name}: not in the table ({known}); describe it with --memory-gb, --read-gb-s and --tflops"
    )


def in_table(name: str) -> Machine | None:
    """As `find_machine`, or None."""
    wanted = _plain(name)
    wanted = ALIASES.get(wanted, wanted)
    return next((m for m in MACHINES if wanted in (_plain(m.name), _plain(m.name).removeprefix("rtx"))), None)


def describe(
    name: str, *, memory_gb: float | None, read_gb_s: float | None, tflops: float | None, link_gb_s: float | None
) -> Machine:
    """A machine of the table, some of whose data-sheet figures may be given; or another, whose must, the link apart.

    Raises:
        ConfigError: not in the table, and not all is given; or a figure that is not above 0.
    """
    given = {"--memory-gb": memory_gb, "--read-gb-s": read_gb_s, "--tflops": tflops, "--link-gb-s": link_gb_s}
    for flag, value in given.items():
        if value is not None and not 0 < value < 1e9:
            raise ConfigError(f"{flag} {value:g}: must be above 0")
    fields = {
        "memory_bytes": memory_gb and memory_gb * 1e9,
        "read_bytes_per_second": read_gb_s and read_gb_s * 1e9,
        "flops_per_second": tflops and tflops * 1e12,
        "link_bytes_per_second": link_gb_s and link_gb_s * 1e9,
        "link_seconds": link_gb_s and _link_seconds(link_gb_s),
    }
    figures: dict[str, Any] = {field: value for field, value in fields.items() if value is not None}
    if in_table(name) is None and None not in (memory_gb, read_gb_s, tflops):
        return Machine(name=name, **figures)
    return replace(find_machine(name), **figures)


def check_link(machine: Machine, num_devices: int) -> None:
    """Raises ConfigError: several such machines, and nothing is known of the link between them."""
    if num_devices > 1 and machine.link_bytes_per_second is None:
        raise ConfigError(
            f"--num-devices {num_devices}: nothing is known of the link between several {machine.name}; name the "
            "machine with --device and give --link-gb-s, what goes over it one way"
        )


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|tensor core|[^a-z0-9]", "", name.lower())
