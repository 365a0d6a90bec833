"""`make bench`: runs the parts that this machine can run and writes their tables into benchmarks/results/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.utils import logging

from . import attention, command, host, loop, merge, sdxl, stages, training
from .measure import Setting
from .report import Report, write

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A benchmark.

    Attributes:
        about: one line for the help.
        run: gives the report; if it takes long, also before it is complete.
        why_not: why it is left out on this machine, None where it runs.
    """

    about: str
    run: Callable[[Setting], Iterator[Report]]
    why_not: Callable[[Setting], str | None] = lambda setting: None


PARTS = {
    "command": Part(about="what the command takes to answer a wrong option", run=command.run),
    "host": Part(about="host time of a call beside the classic pipeline's", run=host.run),
    "loop": Part(about="the denoising loop over bare UNet calls", run=loop.run),
    "stages": Part(about="the embedded model's stages, beside its teacher's", run=stages.run),
    "attention": Part(about="attention strategies at SDXL's sizes", run=attention.run),
    "merge": Part(about="merging a delta beside reading its file", run=merge.run, why_not=merge.why_not),
    "training": Part(about="memory and time of distilling at SDXL's size; computed without a GPU", run=training.run),
    "sdxl": Part(about="full-size SDXL with random weights", run=sdxl.run, why_not=sdxl.why_not),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the named parts, or all of them; prints each table and what was left out."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda is wrong because torch finds no CUDA GPU; pass --device cpu")
    setting = Setting(device=torch.device(options.device), quick=options.quick, seconds=options.seconds)
    directory = options.out or (None if options.quick else RESULTS)
    left_out = []
    for name in options.parts or PARTS:
        reason = PARTS[name].why_not(setting)
        if reason is not None:
            left_out.append(f"{name} was left out: {reason}")
            continue
        path = None if directory is None else directory / f"{name}{_suffix(setting.device)}.md"
        sys.stdout.write(f"{run_part(PARTS[name], setting, path)}\n")
        sys.stdout.flush()
    sys.stdout.write("".join(f"{line}\n" for line in left_out))


def run_part(part: Part, setting: Setting, path: Path | None) -> str:
    """Runs a part and returns its report, which the file holds as far as it has come. A dry run compiles nothing."""
    text = ""
    with torch.compiler.set_stance("force_eager" if setting.quick else "default"):
        for report in part.run(setting):
            text = report.markdown(setting)
            if path is not None:
                write(text, path)
    return text


def _suffix(device: torch.device) -> str:
    return "" if device.type == "cpu" else f"-{device.type}"


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:10} {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Parts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="part", help="all of them if none is named")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="what is measured on (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a dry run with tiny models; writes files only where --out is given"
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="the time budget of sdxl (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, help=f"directory of the tables (default: {RESULTS.name}/ beside this file)"
    )
    return parser


if __name__ == "__main__":
    logging.set_verbosity_error()  # a line for each of many pipelines
    main()
