"""The table of quality: the teacher under standard solvers beside PeRFlow, on the same prompts and the same noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from ..demo.data import RenderedPictures, Renderer
from ..demo.models import LATENT_CHANNELS, LATENT_SIZE
from ..demo.pictures import Prompt, Scene, render
from .classifier import ShapeClassifier
from .judge import Verdicts, frechet_distance, judge, paired_difference, proportion
from .samplers import Sampler

PROMPT_SEED = 20_260  # no training run draws its prompts from this seed
_BATCH = 32

Judge = Callable[[Tensor, Sequence[Prompt], ShapeClassifier], Verdicts]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `seconds` is per picture, end to end, in this run; None for rows that draw nothing."""

    name: str
    steps: int | None
    guidance_scale: float | None
    nfe: int | None
    verdicts: Verdicts
    frechet: float
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Prompts, the noise that every sampler starts from (count, 4, 16, 16), and real pictures of the same prompts."""

    prompts: tuple[Prompt, ...]
    latents: Tensor
    renders: Tensor  # (count, 3, 64, 64) in [0, 1]
    reference: Tensor  # other renders of the same kind, which distances are measured to


def make_evaluation_set(count: int, *, seed: int = PROMPT_SEED, renderer: Renderer = render) -> EvaluationSet:
    """`count` prompts with attributes left open as in training, with fixed seeds; `renderer` draws real pictures.

    Raises:
        ValueError: fewer than 2 prompts, which give no standard error.
    """
    if count < 2:
        raise ValueError(f"prompts={count} is below 2; pass at least 2, and 512 or more for figures worth quoting.")
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    prompts = tuple(Prompt.describe(scene, rng) for scene in scenes)
    generator = torch.Generator().manual_seed(seed)
    return EvaluationSet(
        prompts=prompts,
        latents=torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator),
        renders=_render(scenes, rng, renderer),
        reference=_render([Scene.random(rng) for _ in range(2048)], rng, renderer),
    )


def evaluate_samplers(
    samplers: Sequence[Sampler],
    data: EvaluationSet,
    classifier: ShapeClassifier,
    vae: AutoencoderKL | None = None,
    *,
    judge: Judge = judge,
) -> list[Row]:
    """Draws every prompt with every sampler and judges the pictures by `judge`.

    With `vae` two floors come first: real renders, and their reconstructions.
    """
    rows = []
    if vae is not None:
        rows.append(_row("real renders", data.renders, data, classifier, judge))
        rows.append(_row("VAE reconstructions", reconstruct(vae, data.renders), data, classifier, judge))
    texts = [prompt.text for prompt in data.prompts]
    total = sum(sampler.nfe for sampler in samplers) * len(texts)
    with tqdm(total=total, desc="evaluate", unit="row", unit_scale=True) as progress:
        for sampler in samplers:
            progress.set_postfix_str(sampler.label)
            sampler.draw(texts[:2], data.latents[:2])  # warm-up outside the timing
            drawn, seconds = [], 0.0
            for start in range(0, len(texts), _BATCH):
                chunk = slice(start, start + _BATCH)
                began = time.perf_counter()
                drawn.append(sampler.draw(texts[chunk], data.latents[chunk]).float().cpu())
                seconds += time.perf_counter() - began
                progress.update(sampler.nfe * len(drawn[-1]))
            rows.append(
                _row(
                    f"{sampler.model}, {sampler.solver}",
                    torch.cat(drawn),
                    data,
                    classifier,
                    judge,
                    sampler=sampler,
                    seconds=seconds / len(texts),
                )
            )
    return rows


def report(rows: Sequence[Row]) -> str:
    """Both tables as Markdown; PeRFlow's row of fewest steps is compared with every other."""
    fastest = min((row for row in rows if row.name.startswith("student")), key=lambda row: row.nfe or 0)
    return f"{markdown_table(rows)}\n\n{markdown_differences(rows, fastest)}"


def markdown_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, shares in per cent with their standard errors."""
    lines = [
        "| sampler | steps | guidance | NFE | accuracy % | strict % | Frechet | ms per picture |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            _cell(row.steps),
            "-" if row.guidance_scale is None else f"{row.guidance_scale:g}",
            _cell(row.nfe),
            _percent(row.verdicts.accurate),
            _percent(row.verdicts.strict),
            f"{row.frechet:.2f}",
            "-" if row.seconds is None else f"{1000 * row.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown_differences(rows: Sequence[Row], reference: Row) -> str:
    """How far `reference` is ahead of each other drawn row in accuracy, on the same prompts, in standard errors."""
    lines = [
        f"| {reference.name}, {reference.steps} steps, against | NFE | difference in accuracy | standard errors |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row is reference or row.nfe is None:
            continue
        mean, error = paired_difference(reference.verdicts.accurate, row.verdicts.accurate)
        ratio = f"{mean / error:+.1f}" if error > 0 else "-"
        lines.append(
            f"| {row.name}, {row.steps} steps | {row.nfe} | {100 * mean:+.1f} ± {100 * error:.1f} | {ratio} |"
        )
    return "\n".join(lines)


def _row(
    name: str,
    pictures: Tensor,
    data: EvaluationSet,
    classifier: ShapeClassifier,
    judge: Judge,
    *,
    sampler: Sampler | None = None,
    seconds: float | None = None,
) -> Row:
    return Row(
        name=name,
        steps=sampler.steps if sampler else None,
        guidance_scale=sampler.guidance_scale if sampler else None,
        nfe=sampler.nfe if sampler else None,
        verdicts=judge(pictures, data.prompts, classifier),
        frechet=frechet_distance(pictures, data.reference, classifier),
        seconds=seconds,
    )


def _render(scenes: Sequence[Scene], rng: np.random.Generator, renderer: Renderer) -> Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(renderer(scene, rng)) for scene in scenes]))
    return RenderedPictures(pixels=pixels.permute(0, 3, 1, 2), scenes=tuple(scenes)).unit_interval()


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Pictures (count, 3, height, width) in [0, 1], encoded (the posterior's mode) and decoded."""
    chunks = [vae.decode(vae.encode(chunk * 2 - 1).latent_dist.mode()).sample for chunk in pictures.split(_BATCH)]
    return (torch.cat(chunks) / 2 + 0.5).clamp(0, 1)


def _percent(hits: Tensor) -> str:
    share, error = proportion(hits)
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)
