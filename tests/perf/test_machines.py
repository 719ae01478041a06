"""The table of machines, and how a machine is found or described."""

import pytest

from nybble.core.errors import ConfigError
from nybble.perf.machines import MACHINES, READ_SHARE, describe, find_machine

NOTHING = {"memory_gb": None, "read_gb_s": None, "tflops": None, "link_gb_s": None}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h200", "H200"),
        ("4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB PCIe"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("H100 PCIe", "H100 PCIe"),
    ],
)
def test_a_machine_is_found_as_people_and_drivers_write_it(written: str, name: str) -> None:
    assert find_machine(written).name == name


def test_an_unknown_machine_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"--device MI300X: not in the table .*H200.*--memory-gb, --read-gb-s"):
        find_machine("MI300X")


def test_figures_of_the_table_are_in_their_units() -> None:
    for machine in MACHINES:
        assert 20e9 < machine.memory_bytes < 400e9
        assert 0.2e12 < machine.read_bytes_per_second < 10e12
        assert 50e12 < machine.flops_per_second < 3000e12
        assert machine.integer_ops_per_second is not None
        assert 5e12 < machine.integer_ops_per_second < 60e12


def test_data_sheet_rates_are_reduced_and_measured_ones_are_not() -> None:
    machine = find_machine("H200")
    sustained = machine.sustained()
    assert sustained.read_bytes_per_second == machine.read_bytes_per_second * READ_SHARE
    assert sustained.memory_bytes == machine.memory_bytes
    measured = describe("mine", **NOTHING | {"memory_gb": 1, "read_gb_s": 2, "tflops": 3})
    assert measured.read_bytes_per_second == 2e9
    assert measured.flops_per_second == 3e12


def test_a_machine_may_be_described_in_full_or_in_part() -> None:
    changed = describe("RTX 3090", **NOTHING | {"read_gb_s": 900.0, "link_gb_s": 56.0})
    assert changed.read_bytes_per_second == 900e9
    assert changed.link_bytes_per_second == 56e9
    assert changed.link_seconds < find_machine("RTX 3090").link_seconds, "NVLink"
    assert changed.flops_per_second == find_machine("RTX 3090").flops_per_second
    whole = describe("RTX 3090", **NOTHING | {"memory_gb": 48.0, "read_gb_s": 900.0, "tflops": 70.0})
    assert whole.link_bytes_per_second == find_machine("RTX 3090").link_bytes_per_second, "a figure that was not given"
    assert whole.integer_ops_per_second == find_machine("RTX 3090").integer_ops_per_second
    with pytest.raises(ConfigError, match="not in the table"):
        describe("mine", **NOTHING | {"memory_gb": 80.0, "tflops": 100.0})
    with pytest.raises(ConfigError, match="--tflops 0: must be above 0"):
        describe("H200", **NOTHING | {"tflops": 0.0})
