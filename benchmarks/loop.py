"""What the denoising loop costs over bare UNet calls, beside diffusers' own SDXL pipeline with the same scheduler."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, StableDiffusionXLPipeline
from tqdm.auto import tqdm

from perflow_blocks import PeRFlowScheduler
from perflow_blocks.components.files import atomic_path
from perflow_blocks.demo import perflow_pipeline

RESULTS = Path(__file__).parent / "results" / "loop.md"
BASE = "text encoding and bare UNet calls"
STEPS, BATCH, REPEATS, GUIDANCE = 4, 8, 15, 2.0
PROMPTS = ["a red star on a white background"] * BATCH


def contenders() -> dict[str, Callable[[], Any]]:
    """What is timed, all with the same UNet, embeddings, steps and guidance; latents in and out, no decoding."""
    pipe = perflow_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=GUIDANCE))
    latents = torch.randn(BATCH, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    call = {"prompt": PROMPTS, "latents": latents, "num_inference_steps": STEPS, "output_type": "latent"}
    state = pipe(**call)
    unet: Any = pipe.unet
    scheduler: Any = pipe.scheduler

    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    parts = {name: getattr(pipe, name) for name in names}
    stock = StableDiffusionXLPipeline(
        **parts, scheduler=PeRFlowScheduler.from_config(scheduler.config), add_watermarker=False
    )
    stock.set_progress_bar_config(disable=True)

    conditions = {
        "encoder_hidden_states": torch.cat([state.get("prompt_embeds")] * 2),
        "added_cond_kwargs": {
            "text_embeds": torch.cat([state.get("pooled_prompt_embeds")] * 2),
            "time_ids": torch.cat([state.get("add_time_ids")] * 2),
        },
    }
    twice = torch.cat([latents] * 2)

    @torch.no_grad()
    def bare_calls() -> None:
        stock.encode_prompt(prompt=PROMPTS, do_classifier_free_guidance=True)
        for timestep in scheduler.timesteps:
            unet(twice, timestep, **conditions, return_dict=False)

    def blocks() -> None:
        pipe(**call)

    def stock_pipeline() -> None:
        stock(
            prompt=PROMPTS, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent"
        )

    return {
        BASE: bare_calls,
        "PeRFlow blocks": blocks,
        "StableDiffusionXLPipeline with PeRFlowScheduler": stock_pipeline,
    }


def measure() -> dict[str, float]:
    """Median seconds of each contender, measured in turns."""
    runs = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in tqdm(range(REPEATS + 1), desc="loop", unit="round"):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    medians = measure()
    base = medians[BASE]
    lines = [
        "# Denoising loop",
        "",
        f"Embedded demo model, {BATCH} pictures, {STEPS} steps, guidance {GUIDANCE:g}; text encoded, nothing",
        f"decoded. Medians of {REPEATS} rounds taken in turns. {platform.machine()} CPU,",
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, diffusers {version('diffusers')}.",
        "",
        "| what | ms | ratio |",
        "|---|---|---|",
        *(f"| {name} | {1000 * value:.1f} | {value / base:.3f} |" for name, value in medians.items()),
    ]
    with atomic_path(RESULTS) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
