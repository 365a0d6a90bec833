"""Results as Markdown: tables, the machine they were measured on, files."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from perflow_blocks.atomic_files import atomic_path

from .measure import Setting

CPU_INFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a part found: a heading, and paragraphs and tables in Markdown."""

    title: str
    parts: tuple[str, ...]

    def markdown(self, setting: Setting) -> str:
        quick = ("A dry run with tiny models: the figures say nothing.",) if setting.quick else ()
        return "\n\n".join([f"# {self.title}", *quick, f"{describe_machine(setting.device)}.", *self.parts]) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; cells are written as they are."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def write(text: str, path: Path) -> None:
    """Puts a report into its file, which readers never see half written."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def describe_machine(device: torch.device) -> str:
    """Processor, cores and threads, or the GPU's name, and the versions that matter; no host name."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        machine = (
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}, CUDA {torch.version.cuda})"
        )
    else:
        machine = (
            f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()}), {usable_cores()} cores, "
            f"{torch.get_num_threads()} threads"
        )
    return (
        f"{machine}; torch {torch.__version__}, diffusers {version('diffusers')}, Python {platform.python_version()}"
    )


def cpu_model() -> str:
    """The processor's name where the system tells it, else the architecture."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def megabytes(size: int) -> str:
    return f"{size / 1e6:.0f}" if size >= 1e8 else f"{size / 1e6:.1f}"
