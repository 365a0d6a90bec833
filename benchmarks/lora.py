"""How long SDXL's delta takes to become a LoRA: one layer of each shape is timed, and counted as often as it is there.

`python -m benchmarks.lora --rank 64 --device cuda`
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from perflow_blocks import delta_to_lora

from .models import SDXL, build_unet


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time of a conversion, by the shape of the layers.

    Attributes:
        counts: how many layers have a shape.
        seconds: for one layer of a shape, checks included.
        parameters: numbers in the LoRA of all layers.
    """

    counts: dict[tuple[int, ...], int]
    seconds: dict[tuple[int, ...], float]
    parameters: int

    @property
    def total(self) -> float:
        """Seconds for all layers, without reading the file."""
        return sum(self.seconds[shape] * count for shape, count in self.counts.items())


def run(rank: int = 64, device: str = "cpu") -> Estimate:
    """Factorises one random dW of each shape in half precision, as files hold it, after one for warming up."""
    unet = build_unet(SDXL, "meta")
    shapes = [
        tuple(tensor.shape)
        for name, tensor in unet.state_dict().items()
        if name.endswith(".weight") and tensor.ndim in (2, 4) and "embedding" not in name
    ]
    counts = dict(Counter(shapes))
    generator = torch.Generator().manual_seed(0)
    seconds: dict[tuple[int, ...], float] = {}
    parameters = 0
    logging.disable_progress_bar()
    _factorise(torch.randn(640, 640, generator=generator).half(), rank, device)
    for shape, count in counts.items():
        change = (torch.randn(shape, generator=generator) * 1e-3).half()
        started = time.perf_counter()
        parameters += count * _factorise(change, rank, device)
        seconds[shape] = time.perf_counter() - started
    logging.enable_progress_bar()
    return Estimate(counts=counts, seconds=seconds, parameters=parameters)


def table(estimate: Estimate) -> str:
    """The shapes that cost most together, as Markdown, and the total."""
    shares = sorted(estimate.counts, key=lambda shape: -estimate.counts[shape] * estimate.seconds[shape])
    lines = ["| shape | layers | seconds each | seconds |", "|---|---|---|---|"]
    for shape in shares[:10]:
        count, seconds = estimate.counts[shape], estimate.seconds[shape]
        lines.append(f"| {' x '.join(map(str, shape))} | {count} | {seconds:.3f} | {count * seconds:.1f} |")
    layers = sum(estimate.counts.values())
    lines.append(f"| all {len(estimate.counts)} shapes | {layers} | - | {estimate.total:.1f} |")
    return "\n".join(lines) + f"\n\nThe LoRA holds {estimate.parameters:,} numbers."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    print(table(run(options.rank, options.device)))


def _factorise(change: torch.Tensor, rank: int, device: str) -> int:
    return delta_to_lora({"mid_block.resnets.0.conv1.weight": change}, rank=rank, device=device).report.parameters


if __name__ == "__main__":
    main()
