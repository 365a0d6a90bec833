"""What a call costs on the host: Python and small tensor operations, with a UNet that costs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
)

from perflow_blocks import PeRFlowSDXLAutoBlocks

from .contenders import GUIDANCE, assert_agreement, classic_pipeline, make_request, modular_pipeline
from .measure import Run, Setting, time_in_turns
from .models import DEEP, TINY, FreeUNet, Size, build_components
from .report import Report, table

STEPS, ROUNDS = 4, 25
PROMPT = "a red star on a white background"
CLASSIC, STOCK, OURS = "`StableDiffusionXLPipeline`", "`StableDiffusionXLAutoBlocks`", "`PeRFlowSDXLAutoBlocks`"

TEXT = """Processor time on one thread of a call of {steps} steps with guidance {guidance:g}: one image, nothing
decoded, and a UNet that returns its input. All models have as many modules as SDXL's ({modules:,} in the UNet) and a
few channels each, since what a call does on the host grows with the number of modules. All pipelines use
`PeRFlowScheduler`, and their latents agree. From embeddings, the stock blocks run without their text encoder, which
accepts no embeddings. {rounds} rounds in turns. Other work on the machine only adds to the least time, which the ratio
compares."""


def run(setting: Setting) -> Iterator[Report]:
    size = TINY if setting.quick else DEEP
    components = build_components(size, setting.device, torch.float32, FreeUNet)
    text = TEXT.format(
        steps=STEPS,
        guidance=GUIDANCE,
        modules=sum(1 for _ in components["unet"].modules()),
        rounds=setting.rounds(ROUNDS),
    )
    with _one_thread():
        sections = [
            part
            for title, prompt in (("From embeddings to latents", None), ("From a prompt to latents", PROMPT))
            for part in (f"## {title}", measure(make_calls(components, size, setting, prompt), setting, title))
        ]
    yield Report(title="Host time of a call", parts=(text, *sections))


def make_calls(components: Mapping[str, Any], size: Size, setting: Setting, prompt: str | None) -> dict[str, Run]:
    """Functions that return the latents (1, 4, latents, latents), from random embeddings if there is no prompt.

    Raises:
        AssertionError: their latents differ by more than rounding.
    """
    request = make_request(size, STEPS, setting.device, prompt=prompt) | {"output_type": "latent"}
    stock_blocks = StableDiffusionXLAutoBlocks()
    if prompt is None:
        stock_blocks.sub_blocks.pop("text_encoder")
    classic = classic_pipeline(components)
    calls: dict[str, Any] = {CLASSIC: lambda: classic(**request, guidance_scale=GUIDANCE).images}
    for name, blocks in ((STOCK, stock_blocks), (OURS, PeRFlowSDXLAutoBlocks())):
        calls[name] = partial(modular_pipeline(blocks, components), **request, output="images")
    assert_agreement({name: call() for name, call in calls.items()}, CLASSIC)
    return calls


def measure(calls: Mapping[str, Run], setting: Setting, label: str) -> str:
    """The table of processor time."""
    timings = time_in_turns(calls, setting, rounds=ROUNDS, label=label, now=time.process_time)
    least = {name: min(timing.seconds) for name, timing in timings.items()}
    return table(
        ("what", "least ms", "median ms (quartiles)", "times the classic pipeline"),
        (
            (name, f"{1000 * least[name]:.2f}", timing.milliseconds(), f"{least[name] / least[CLASSIC]:.2f}")
            for name, timing in timings.items()
        ),
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
