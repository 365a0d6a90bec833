"""Draws the same prompts from the same noise with several samplers and measures the images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .samplers import Sampler
from .sheet import contact_sheet

Scorer = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""Images (n, 3, height, width) in [0, 1], and which of the prompts they are of, to values by name, (n,) each."""
SHOWN = 8
_CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measures of one sampler, or of given images, which have neither sampler nor seconds (per image).

    `scores` are values of each image, (count,). `distances` are to the reference images, with the deviation where the
    metric gives one. `examples` are the first images, (n, 3, height, width) in [0, 1].
    """

    name: str
    sampler: Sampler | None = None
    seconds: float | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    distances: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)
    examples: Tensor


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """What samplers are measured on, and by.

    `latents` (len(prompts), channels, height, width) are the noise that every sampler starts from. `distances` are
    torchmetrics such as FID; they have seen their reference images unless these are the teacher's (`to_teacher`).
    `floors` are rows of given images, for comparison.
    """

    prompts: Sequence[str]
    latents: Tensor
    scorers: list[Scorer] = field(default_factory=list)
    distances: dict[str, Any] = field(default_factory=dict)
    to_teacher: bool = False
    floors: list[Row] = field(default_factory=list)


def evaluate_samplers(
    samplers: Sequence[Sampler], data: EvaluationSet, *, teacher: Sampler | None = None, batch_size: int = 1
) -> list[Row]:
    """Measures 8-bit images of all samplers; the teacher draws first, and PSNR and SSIM are to its images."""
    rows, order = list(data.floors), [*([teacher] if teacher else []), *samplers]
    total = sum(sampler.nfe for sampler in order) * len(data.prompts)
    with tqdm(total=total, desc="evaluate", unit="row", unit_scale=True) as bar:
        for sampler in order:
            images, seconds = _draw(sampler, data, batch_size, bar)
            is_reference = sampler is teacher and data.to_teacher
            measures = replace(data, distances={}) if is_reference else data
            row = measure(f"{sampler.model}, {sampler.solver}", images, measures)
            rows.append(replace(row, sampler=sampler, seconds=seconds))
            for metric in data.distances.values() if is_reference else ():
                for chunk in images.split(_CHUNK):
                    metric.update(chunk.to(metric.device) / 255.0, real=True)
            if sampler is teacher:
                from .metrics import closeness  # torchmetrics, which no other row needs

                data = replace(data, scorers=[*data.scorers, closeness(images)])
    return rows


@torch.no_grad()
def measure(name: str, images: Tensor, data: EvaluationSet) -> Row:
    """Measures images (count, 3, height, width) of 8 bits, one for each prompt."""
    scores: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), _CHUNK):
        where = slice(start, start + _CHUNK)
        chunk = images[where] / 255.0
        for scorer in data.scorers:
            for key, values in scorer(chunk, where).items():
                scores.setdefault(key, []).append(values.double().cpu())
        for metric in data.distances.values():
            metric.update(chunk.to(metric.device), real=False)
    return Row(
        name=name,
        scores={key: torch.cat(values) for key, values in scores.items()},
        distances={key: _compute(metric) for key, metric in data.distances.items()},
        examples=images[:SHOWN] / 255.0,
    )


def _draw(sampler: Sampler, data: EvaluationSet, batch_size: int, bar: Any) -> tuple[Tensor, float]:
    """All images as 8-bit values, and the seconds for each."""
    bar.set_postfix_str(sampler.label)
    sampler.draw(data.prompts[:batch_size], data.latents[:batch_size])  # warm-up outside the timing
    drawn, seconds = [], 0.0
    for start in range(0, len(data.prompts), batch_size):
        where = slice(start, start + batch_size)
        began = time.perf_counter()
        images = sampler.draw(data.prompts[where], data.latents[where]).float().cpu()
        seconds += time.perf_counter() - began
        drawn.append((255.0 * images).round().to(torch.uint8))
        bar.update(sampler.nfe * len(images))
    return torch.cat(drawn), seconds / len(data.prompts)


def _compute(metric: Any) -> tuple[float, float | None]:
    with torch.random.fork_rng():  # KID draws subsets
        torch.manual_seed(0)
        value = metric.compute()
    metric.reset()
    return (float(value[0]), float(value[1])) if isinstance(value, tuple) else (float(value), None)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of (count,) values and its standard error."""
    values = values.double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def plus_minus(mean: float, error: float, sign: str = "") -> str:
    """A mean and its standard error, to two digits of the error."""
    digits = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 1
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def baseline_of(rows: Sequence[Row]) -> Row:
    """What the others are compared with: of PeRFlow's rows the one of least NFE, else the last row."""
    students = [row for row in rows if row.sampler and row.sampler.solver == "PeRFlow"]
    return min(students, key=lambda row: row.sampler.nfe if row.sampler else 0, default=rows[-1])


def markdown(rows: Sequence[Row], baseline: Row | None = None) -> str:
    """Two tables: the rows, and how far `baseline` (default: `baseline_of`) is above the others, image by image."""
    return f"{markdown_table(rows)}\n\n{markdown_differences(rows, baseline or baseline_of(rows))}"


def markdown_table(rows: Sequence[Row]) -> str:
    """Means and standard errors of the scores, and the distances."""
    scores = list(dict.fromkeys(name for row in rows for name in row.scores))
    distances = list(dict.fromkeys(name for row in rows for name in row.distances))
    body = []
    for row in rows:
        one = row.sampler
        cells = [row.name, *((str(one.steps), f"{one.guidance_scale:g}", str(one.nfe)) if one else "---")]
        cells += [plus_minus(*mean_and_error(row.scores[name])) if name in row.scores else "-" for name in scores]
        for value, deviation in (row.distances.get(name, (None, None)) for name in distances):
            cells.append("-" if value is None else plus_minus(value, deviation) if deviation else f"{value:.2f}")
        body.append([*cells, "-" if row.seconds is None else f"{1000 * row.seconds:.0f}"])
    return _table(["sampler", "steps", "guidance", "NFE", *scores, *distances, "ms per image"], body)


def markdown_differences(rows: Sequence[Row], baseline: Row) -> str:
    """`baseline` less each other drawn row, in every score: paired differences on the same prompts and noise."""
    body = []
    for row in rows:
        if row.sampler is not None and row is not baseline:
            pairs = differences(baseline, row)
            cells = [plus_minus(*pairs[name], "+") if name in pairs else "-" for name in baseline.scores]
            body.append([f"{row.name}, {row.sampler.steps} steps", str(row.sampler.nfe), *cells])
    steps = baseline.sampler.steps if baseline.sampler else "-"
    return _table([f"{baseline.name}, {steps} steps, less", "NFE", *baseline.scores], body)


def differences(row: Row, other: Row) -> dict[str, tuple[float, float]]:
    """Mean and standard error of `row` less `other`, image by image, for each score that both have."""
    return {name: mean_and_error(row.scores[name] - other.scores[name]) for name in row.scores if name in other.scores}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def as_tree(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a JSON file, each with the paired differences of `baseline_of(rows)` less it."""

    def named(found: Mapping[str, tuple[float, float | None]]) -> dict[str, Any]:
        return {name: {"mean": mean, "error": error} for name, (mean, error) in found.items()}

    tree = []
    for row in rows:
        one = row.sampler
        settings = {"steps": one.steps, "guidance_scale": one.guidance_scale, "nfe": one.nfe} if one else {}
        scores = named({name: mean_and_error(values) for name, values in row.scores.items()})
        less = named(differences(baseline_of(rows), row))
        measured = {"scores": scores, "distances": named(row.distances), "baseline_less_this": less}
        tree.append({"name": row.name, **settings, "seconds": row.seconds, **measured})
    return tree


def comparison_sheet(rows: Sequence[Row], captions: Sequence[str], *, title: str = "") -> Image.Image:
    """The first images: a line for each caption, which stands at the left, and a column for each row."""
    images, labels = [], []
    for number, caption in enumerate(captions[:SHOWN]):
        for row in rows:
            images += VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(row.examples[number : number + 1]))
            one = row.sampler
            label = f"{row.name}, {one.steps} steps, NFE {one.nfe}" if one else row.name
            labels.append(f"{label}\n{caption}" if row is rows[0] else label)
    return contact_sheet(images, labels, columns=len(rows), title=title)
