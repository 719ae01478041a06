"""`nybble doctor`: what this machine has, which kernels would run, what is missing and how to get it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nybble import __version__
from nybble.commands.imports import ctrl_c_exits
from nybble.core import env, machine

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

State = Literal["ok", "slow", "missing"]
MARKS = {"ok": "[green]✓[/]", "slow": "[yellow]![/]", "missing": "[red]✗[/]"}
PACKAGES = (
    "triton",
    "transformers",
    "tokenizers",
    "jinja2",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "typer",
    "rich",
    "msgspec",
    "pyzmq",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "matplotlib",
    "pyyaml",
    "xgrammar",
)


@dataclass(frozen=True)
class Finding:
    """`slow`: nybble runs, but not as well as it could. `missing`: nybble cannot run. `remedy` says what to do."""

    subject: str
    state: State
    detail: str
    remedy: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs, and for bug reports.")] = False,
) -> None:
    """Show what this machine has, which kernels nybble would use here, and what is missing.

    Exit code 1 if nybble cannot run here.
    """
    cache = _cache()
    needed = _needed_versions()
    findings = [*_system(), cache, *(_package(name, needed) for name in PACKAGES), *_torch(needed), *_kernels(cache)]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    else:
        _show(findings)
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        remedy = f"\n[bold]→ {escape(finding.remedy)}[/]" if finding.remedy else ""
        table.add_row(MARKS[finding.state], finding.subject, escape(finding.detail) + remedy)
    Console(highlight=False).print(table)


def _system() -> Iterator[Finding]:
    yield Finding("nybble", "ok", __version__)
    yield Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")
    yield Finding("system", "ok", f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Finding("cpu", "ok", f"{machine.cpu_name()}, {len(os.sched_getaffinity(0))} cores usable")
    if (total := machine.memory_bytes()) is not None:
        yield Finding("memory", "ok", f"{total / 2**30:.1f} GiB")


def _cache() -> Finding:
    try:
        folder = env.cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        remedy = "set NYBBLE_CACHE_DIR to a folder that can be written: the fast kernels are compiled into it"
        return Finding("kernel cache", "slow", str(error), remedy)
    return Finding("kernel cache", "ok", str(folder))


def _needed_versions() -> dict[str, SpecifierSet]:
    """What the installed nybble asks for; {} where that cannot be read, and then only presence is looked at."""
    try:
        from packaging.requirements import Requirement

        needs = [Requirement(text) for text in importlib.metadata.requires("nybble") or ()]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    here = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return {need.name.replace("-", "_"): need.specifier for need in here}


def _package(name: str, needed: dict[str, SpecifierSet]) -> Finding:
    state: State = "slow" if name == "triton" else "missing"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, state, "not installed", f"pip install {name}")
    if name in needed and not needed[name].contains(version, prereleases=True):
        remedy = f'pip install "{name}{needed[name]}"'
        return Finding(name, state, f"{version}, but nybble needs {needed[name]}", remedy)
    return Finding(name, "ok", version)


def _torch(needed: dict[str, SpecifierSet]) -> Iterator[Finding]:
    try:
        with ctrl_c_exits():
            import torch
    except Exception as error:  # a broken installation raises anything
        yield Finding("torch", "missing", f"cannot be imported: {error}", "pip install torch")
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    package = _package("torch", needed)
    detail = f"{torch.__version__} ({built}, {torch.get_num_threads()} threads)"
    yield Finding("torch", "ok", detail) if package.state == "ok" else package
    driver = machine.driver_version()
    if torch.cuda.is_available():
        yield Finding("driver", "ok", driver or "present, version unknown (no nvidia-smi)")
        for index in range(torch.cuda.device_count()):
            yield _gpu(index)
    elif driver is None:
        yield Finding("gpu", "slow", "no NVIDIA driver: models run on the CPU", "on a GPU machine install its driver")
    elif torch.version.cuda is None:
        yield Finding(
            "gpu", "slow", f"driver {driver}, but this torch is a CPU build", "install a CUDA build: pip install torch"
        )
    else:
        yield Finding(
            "gpu",
            "slow",
            f"driver {driver}, but torch's CUDA {torch.version.cuda} finds no device",
            "update the driver, or install a torch built for its CUDA version; look at CUDA_VISIBLE_DEVICES",
        )


def _gpu(index: int) -> Finding:
    import torch

    facts = torch.cuda.get_device_properties(index)
    detail = (
        f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, capability {facts.major}.{facts.minor}, "
        f"{facts.multi_processor_count} SMs"
    )
    if (facts.major, facts.minor) < (8, 0):
        return Finding(f"gpu {index}", "slow", detail, "the fast kernels need capability 8.0 (Ampere) or newer")
    return Finding(f"gpu {index}", "ok", detail)


def _kernels(cache: Finding) -> Iterator[Finding]:
    """Which implementation each operation would get, and why not the ones before it."""
    try:
        import torch

        from nybble.kernels.check import OPS, sizes_of
        from nybble.kernels.op import Spec, bind
    except ImportError:
        return  # torch's absence was told already
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    for name, op in OPS.items():
        *_, case = op.cases(True)  # the largest model's
        spec = Spec(device=device, dtype=dtype, sizes=sizes_of(case))
        chosen = bind(op, spec)
        reasons = []
        for impl in op.impls:
            if impl is chosen:
                break
            reasons.append(f"{impl.name}: {impl.supports(spec)}")
        state: State = "slow" if chosen is op.reference and device.type == "cuda" else "ok"
        because = f"  ({'; '.join(reasons)})" if reasons and (device.type == "cuda" or state == "slow") else ""
        yield Finding(f"kernel {name}", state, f"{chosen.name}{because}")
    if device.type == "cpu":
        yield _c_kernels(cache)


def _c_kernels(cache: Finding) -> Finding:
    """The C kernels are what makes a CPU fast."""
    from nybble.kernels.cpu import compiler

    try:
        compiler.compiler_command()
    except compiler.BuildError as error:
        return Finding("c kernels", "slow", str(error), "install a C compiler (gcc or clang): 4-bit models run faster")
    try:
        compiler.build(env.cache_dir() / "cpu")
    except compiler.BuildError as error:
        return Finding("c kernels", "slow", str(error), cache.remedy or "set CC to a compiler that can (gcc or clang)")
    return Finding("c kernels", "ok", "built for this CPU")
