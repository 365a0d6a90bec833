"""Image-to-image and inpainting with the embedded model: what changes, what stays, and which noising is better.

python -m benchmarks.editing --prompts 256 --out docs/editing.md
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from tqdm.auto import tqdm

from perflow_blocks.demo import perflow_pipeline
from perflow_blocks.demo.images import COLORS, IMAGE_SIZE, SHAPES, Prompt, Scene, render
from perflow_blocks.demo.judge import judge, load_classifier, reconstruct
from perflow_blocks.demo.models import LATENT_CHANNELS, LATENT_SIZE, VAE_FACTOR
from perflow_blocks.evaluation.measure import mean_and_error, plus_minus

from .report import table, write

EDITING_SEED = 30_260  # no training run and no other evaluation draws from it
WORDINGS = ("own", "color", "shape", "both")
"""Prompts name all attributes: the input's own, or with another colour, another shape, or both."""
MARGINS = {"tight": 2, "wide": 10}
"""Holes around the shape, by the pixels that they leave around it. A third hole, `half`, is half the image."""
STRENGTHS = (0.3, 0.5, 0.8)
INSIDE_WINDOWS = (0.1, 0.3, 0.4, 0.6, 0.8, 0.9)
"""Strengths at which chord and marginal differ; at window boundaries they are one."""
CHANGED = {"color": "another colour", "shape": "another shape", "both": "both"}
HOLES = {"tight": "both", "wide": "both", "half": "own"}
"""The wording of the prompt for each hole: the half that is kept may show a part of the input's shape."""
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class EditingSet:
    """Rendered inputs, prompts for each of `WORDINGS`, masks for each kind of hole, and noise.

    Attributes:
        inputs: RGB images of 64x64 pixels.
        prompts: wording to one prompt for each input.
        masks: kind of hole to one mask for each input, white where it is painted; holes consist of whole latents.
        latents: the noise of text-to-image and inpainting, (count, 4, 16, 16).
        seed: image-to-image draws image n from a generator seeded `seed + n`.
    """

    inputs: tuple[Image.Image, ...]
    prompts: dict[str, tuple[Prompt, ...]]
    masks: dict[str, tuple[Image.Image, ...]]
    latents: Tensor
    seed: int

    def __len__(self) -> int:
        return len(self.inputs)

    def pixels(self) -> Tensor:
        """The inputs, (count, 3, 64, 64) in [0, 1]."""
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in self.inputs]))
        return pixels.permute(0, 3, 1, 2).float() / 255.0

    def painted(self, hole: str) -> Tensor:
        """Whether a pixel lies in the hole, bool of shape (count, 1, 64, 64)."""
        masks = np.stack([np.asarray(mask) for mask in self.masks[hole]])
        return torch.from_numpy(masks > 127).unsqueeze(1)


def make_editing_set(count: int, *, seed: int = EDITING_SEED) -> EditingSet:
    """`count` random scenes and all that edits of them need; the same seed gives the same set."""
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    inputs = tuple(render(scene, rng) for scene in scenes)
    generator = torch.Generator().manual_seed(seed)
    return EditingSet(
        inputs=inputs,
        prompts=_prompts(scenes, rng),
        masks={
            **{name: tuple(_around_shape(one, margin) for one in inputs) for name, margin in MARGINS.items()},
            "half": tuple(_half_with_shape(one) for one in inputs),
        },
        latents=torch.randn(count, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator),
        seed=seed,
    )


def _prompts(scenes: Sequence[Scene], rng: np.random.Generator) -> dict[str, tuple[Prompt, ...]]:
    own = [Prompt.describe(scene, rng, keep=1.0) for scene in scenes]
    colors = [_another(rng, tuple(COLORS), scene.color) for scene in scenes]
    shapes = [_another(rng, SHAPES, scene.shape) for scene in scenes]
    reshaped = [replace(prompt, shape=shape) for prompt, shape in zip(own, shapes, strict=True)]
    return {
        "own": tuple(own),
        "color": tuple(replace(prompt, color=color) for prompt, color in zip(own, colors, strict=True)),
        "shape": tuple(reshaped),
        "both": tuple(replace(prompt, color=color) for prompt, color in zip(reshaped, colors, strict=True)),
    }


def _another(rng: np.random.Generator, options: Sequence[str], value: str) -> str:
    others = [option for option in options if option != value]
    return others[int(rng.integers(len(others)))]


def _around_shape(image: Image.Image, margin: int) -> Image.Image:
    """The shape's bounding box, wider by `margin` pixels on each side and then out to whole latents.

    The top and bottom rows of latents, where no render has a shape, stay known, so that something always does.
    """
    left, top, right, bottom = _shape_box(image)
    low = [(edge - margin) // VAE_FACTOR * VAE_FACTOR for edge in (left, top)]
    high = [-(-(edge + margin) // VAE_FACTOR) * VAE_FACTOR for edge in (right, bottom)]
    first, last = VAE_FACTOR, IMAGE_SIZE - VAE_FACTOR
    return _mask(max(0, low[0]), max(first, low[1]), min(IMAGE_SIZE, high[0]), min(last, high[1]))


def _half_with_shape(image: Image.Image) -> Image.Image:
    """The left or the right half, whichever has the shape's centre."""
    left, _, right, _ = _shape_box(image)
    middle = IMAGE_SIZE // 2
    start = 0 if left + right < IMAGE_SIZE else middle
    return _mask(start, 0, start + middle, IMAGE_SIZE)


def _shape_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (the latter two exclusive) of what differs from a render's flat background."""
    pixels = np.asarray(image)
    shape = (pixels != pixels[0, 0]).any(-1)
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _mask(left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One way of drawing a whole set: text-to-image without `strength`, inpainting with a `hole`."""

    wording: str = "own"
    strength: float | None = None
    steps: int = 4
    noising: str = "chord"
    hole: str | None = None
    keep_known_pixels: bool = True

    @property
    def label(self) -> str:
        task = "text-to-image" if self.strength is None else f"strength {self.strength:g}, {self.noising}"
        return f"{task}, {self.steps} steps" + (f", {self.hole} hole" if self.hole else "")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a pipeline gave.

    Attributes:
        images: (count, 3, 64, 64) in [0, 1].
        change: final latents less the encoded input, (count, 4, 16, 16); None for text-to-image.
        steps: how many were run.
        noise_to_signal: Q / P of the noised input `P x0 + Q noise` that the run started from; None for text-to-image.
    """

    images: Tensor
    change: Tensor | None
    steps: int
    noise_to_signal: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The measures of one edit; tensors have one entry for each image.

    Attributes:
        accurate: per cent, against the prompts of the edit.
        strict: per cent.
        psnr: of image to input, in decibels.
        difference: mean absolute difference of image and input, in levels of 255.
        steps: how many were run; 0 where nothing was drawn.
        noise_to_signal: as in `Drawn`.
        latent_distance: root mean square change of the latents; None for text-to-image.
        known: of the part outside the hole, pixels whose 8-bit values changed, the mean absolute difference in levels
            of 255, and latent values that changed; None without a hole.
    """

    accurate: Tensor
    strict: Tensor
    psnr: Tensor
    difference: Tensor
    steps: int = 0
    noise_to_signal: float | None = None
    latent_distance: Tensor | None = None
    known: tuple[Tensor, Tensor, Tensor] | None = None


def evaluate_edits(pipe: Any, data: EditingSet, edits: Sequence[Edit]) -> dict[Edit, Outcome]:
    """Draws the whole set with every edit and measures the results."""
    outcomes = {}
    with tqdm(total=len(edits) * len(data), desc="edit", unit="image") as progress:
        for edit in edits:
            progress.set_postfix_str(edit.label)
            parts = []
            for start in range(0, len(data), _BATCH):
                parts.append(draw(pipe, data, edit, slice(start, start + _BATCH)))
                progress.update(len(parts[-1].images))
            outcomes[edit] = measure(_joined(parts), data, edit)
    return outcomes


def draw(pipe: Any, data: EditingSet, edit: Edit, chunk: slice) -> Drawn:
    """Draws the images of the set that `chunk` names, in one batch."""
    arguments: dict[str, Any] = {
        "prompt": [prompt.text for prompt in data.prompts[edit.wording][chunk]],
        "num_inference_steps": edit.steps,
        "output_type": "pt",
    }
    outputs = ["images", "latents", "step_plan"]
    if edit.strength is not None:
        arguments |= {
            "image": list(data.inputs[chunk]),
            "strength": edit.strength,
            "noising": edit.noising,
            "generator": [torch.Generator().manual_seed(data.seed + n) for n in range(len(data))[chunk]],
        }
        outputs += ["image_latents", "noise_coefficients"]
    if edit.hole is not None:
        masks = list(data.masks[edit.hole][chunk])
        arguments |= {"mask_image": masks, "keep_known_pixels": edit.keep_known_pixels}
    if edit.strength is None or edit.hole is not None:
        arguments["latents"] = data.latents[chunk]  # image-to-image would take them for the noised input
    drawn = pipe(**arguments, output=outputs)
    signal, sigma = drawn["noise_coefficients"][0].tolist() if edit.strength is not None else (1.0, 0.0)
    return Drawn(
        images=drawn["images"].float().cpu(),
        change=(drawn["latents"] - drawn["image_latents"]).float().cpu() if edit.strength is not None else None,
        steps=len(drawn["step_plan"]),
        noise_to_signal=sigma / signal if edit.strength is not None else None,
    )


def measure(drawn: Drawn, data: EditingSet, edit: Edit) -> Outcome:
    """Judges the images of the whole set and compares them with the inputs."""
    outcome = replace(
        measure_images(drawn.images, data, edit.wording), steps=drawn.steps, noise_to_signal=drawn.noise_to_signal
    )
    if drawn.change is None:
        return outcome
    outcome = replace(outcome, latent_distance=drawn.change.square().mean((1, 2, 3)).sqrt())
    if edit.hole is None:
        return outcome
    outside = ~data.painted(edit.hole)
    latents_outside = outside[..., ::VAE_FACTOR, ::VAE_FACTOR]  # holes consist of whole latents
    levels, given = 255.0 * drawn.images, 255.0 * data.pixels()
    pixels = ((levels.round() != given.round()).any(1, keepdim=True) & outside).sum((1, 2, 3))
    difference = ((levels - given).abs() * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
    latents = ((drawn.change != 0) & latents_outside).sum((1, 2, 3))
    return replace(outcome, known=(pixels, difference, latents))


def measure_images(images: Tensor, data: EditingSet, wording: str) -> Outcome:
    """The measures that need nothing but images (count, 3, 64, 64) in [0, 1]."""
    accurate, strict = judge(images, data.prompts[wording], load_classifier())
    inputs = data.pixels()
    psnr = peak_signal_noise_ratio(images, inputs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return Outcome(
        accurate=100.0 * torch.tensor(accurate),
        strict=100.0 * torch.tensor(strict),
        psnr=psnr.clamp(max=100.0),
        difference=255.0 * (images - inputs).abs().mean((1, 2, 3)),
    )


def measure_floors(vae: Any, data: EditingSet) -> dict[str, Outcome]:
    """What drawing nothing gives: `decoded`, inputs encoded and decoded, and `blank`, their half hole left flat."""
    inputs = data.pixels()
    blank = torch.where(data.painted("half"), inputs[..., :1, :1], inputs)
    decoded = reconstruct(vae, (255.0 * inputs).round()).float() / 255.0
    return {"decoded": measure_images(decoded, data, "own"), "blank": measure_images(blank, data, "own")}


def _joined(parts: Sequence[Drawn]) -> Drawn:
    changes = [part.change for part in parts if part.change is not None]
    return replace(
        parts[0],
        images=torch.cat([part.images for part in parts]),
        change=torch.cat(changes) if changes else None,
    )


Outcomes = Mapping[Edit, Outcome]


def editing_report(pipe: Any, data: EditingSet) -> str:
    """Draws every edit of the tables and writes them as Markdown."""
    outcomes = evaluate_edits(pipe, data, planned_edits())
    floors = measure_floors(pipe.vae, data)
    parts = [
        "# Image-to-image and inpainting with the embedded model",
        f"{len(data)} rendered inputs, seed {data.seed}, the same prompts and noise in every row; ± is one standard "
        f"error. Made by `python -m benchmarks.editing --prompts {len(data)}`. The judge is that of the evaluation: "
        "accurate is an image in which everything named is right, strict one whose colours are clean as well.",
        "## Image-to-image: the input's own prompt",
        strength_table(outcomes, floors),
        "## Image-to-image: a prompt that names something else",
        "Accuracy in per cent against the new prompt, in four steps.",
        wording_table(outcomes),
        "## Noising inside a window: chord less marginal",
        "What comes back is compared with the input; at window boundaries the two are one. Noise : signal is Q / P of "
        "the noised input `P x0 + Q noise`. The last three columns are paired differences: positive is better with "
        "the chord. Inpainting starts at a boundary, but its known part is noised again inside windows; the holes "
        "and prompts are those of the next table.",
        noising_table(outcomes),
        "## Inpainting: what is in the hole",
        "Holes around the shape leave at least 2 (tight) or 10 pixels (wide) around it, and the prompt names another "
        "shape and colour on the same background. For the half image it names what the input shows. Beside each "
        "the paired difference to text-to-image with the same prompts and noise.",
        hole_table(outcomes, data),
        f"With the half hole left flat, in the background's colour, {_mean(floors['blank'].accurate)} % are accurate.",
        "## Inpainting: what is outside the hole",
        "In four steps at strength 1. Decoded alone is `keep_known_pixels=False`.",
        known_table(outcomes, data),
    ]
    return "\n\n".join(parts)


def planned_edits() -> list[Edit]:
    """Every edit that a table shows, each once."""
    edits = [Edit(wording=wording, strength=s) for wording in WORDINGS for s in (*STRENGTHS, None)]
    for chord in noising_pairs():
        edits += [chord, replace(chord, noising="marginal")]
    for edit in hole_edits():
        edits += [edit, replace(edit, keep_known_pixels=False)] if _first_of_hole(edit) else [edit]
    return list(dict.fromkeys(edits))


def noising_pairs() -> list[Edit]:
    """The edits that are drawn with both ways of noising, as they are with the chord."""
    pairs = [Edit(strength=s, steps=steps) for steps in (4, 8) for s in INSIDE_WINDOWS]
    return pairs + [Edit(wording=wording, strength=1.0, steps=8, hole=hole) for hole, wording in HOLES.items()]


def hole_edits() -> list[Edit]:
    settings = ((1.0, 4), (1.0, 8), (0.8, 4))
    return [Edit(wording=w, hole=hole, strength=s, steps=n) for hole, w in HOLES.items() for s, n in settings]


def strength_table(outcomes: Outcomes, floors: Mapping[str, Outcome]) -> str:
    rows = [("encoded and decoded", floors["decoded"])]
    rows += [(f"strength {s:g}", outcomes[Edit(strength=s)]) for s in STRENGTHS]
    rows += [("text-to-image", outcomes[Edit()])]
    header = ["", "steps run", "PSNR dB", "difference, levels", "latent distance", "accuracy %", "strict %"]
    return table(
        header,
        (
            [
                name,
                str(outcome.steps or "-"),
                _mean(outcome.psnr),
                _mean(outcome.difference),
                "-" if outcome.latent_distance is None else _mean(outcome.latent_distance),
                _mean(outcome.accurate),
                _mean(outcome.strict),
            ]
            for name, outcome in rows
        ),
    )


def wording_table(outcomes: Outcomes) -> str:
    rows = [[f"strength {s:g}" if s else "text-to-image"] for s in (*STRENGTHS, None)]
    for row, s in zip(rows, (*STRENGTHS, None), strict=True):
        row += [_mean(outcomes[Edit(wording=wording, strength=s)].accurate) for wording in CHANGED]
    return table(["", *CHANGED.values()], rows)


def noising_table(outcomes: Outcomes) -> str:
    rows = []
    for edit in noising_pairs():
        chord, marginal = outcomes[edit], outcomes[replace(edit, noising="marginal")]
        ratios = ["-" if edit.hole else f"{one.noise_to_signal:.3f}" for one in (chord, marginal)]
        rows.append(
            [
                f"inpainting, {edit.hole} hole" if edit.hole else "image-to-image",
                f"{edit.strength:g}",
                f"{chord.steps} of {edit.steps}",
                " / ".join(ratios),
                f"{_mean(chord.psnr)} / {_mean(marginal.psnr)}",
                _difference(chord.psnr, marginal.psnr),
                _difference(chord.accurate, marginal.accurate),
                _difference(chord.strict, marginal.strict),
            ]
        )
    both = [f"{name}, chord / marginal" for name in ("noise : signal", "PSNR dB")]
    return table(["", "strength", "steps run", *both, "PSNR", "accuracy %", "strict %"], rows)


def hole_table(outcomes: Outcomes, data: EditingSet) -> str:
    rows = []
    for edit in hole_edits():
        outcome, whole = outcomes[edit], outcomes[Edit(wording=edit.wording)]
        rows.append(
            [
                f"{edit.hole}, {100 * float(data.painted(str(edit.hole)).float().mean()):.0f} % of the image",
                f"{edit.strength:g}",
                str(outcome.steps),
                _mean(outcome.accurate),
                _difference(outcome.accurate, whole.accurate),
                _mean(outcome.strict),
                _difference(outcome.strict, whole.strict),
            ]
        )
    header = ["hole", "strength", "steps", "accuracy %", "to text-to-image", "strict %", "to text-to-image"]
    return table(header, rows)


def known_table(outcomes: Outcomes, data: EditingSet) -> str:
    rows = []
    for edit in filter(_first_of_hole, hole_edits()):
        kept, decoded = outcomes[edit].known, outcomes[replace(edit, keep_known_pixels=False)].known
        assert edit.hole and kept and decoded
        pixels = int((~data.painted(edit.hole)).sum())
        rows.append(
            [
                edit.hole,
                f"{int(kept[2].sum()):,} of {pixels * LATENT_CHANNELS // VAE_FACTOR**2:,}",
                f"{int(kept[0].sum()):,} of {pixels:,}",
                f"{int(decoded[0].sum()):,} of {pixels:,}",
                _mean(decoded[1]),
            ]
        )
    header = ["hole", "latent values changed", "pixels changed", "decoded alone: pixels changed", "by levels"]
    return table(header, rows)


def _first_of_hole(edit: Edit) -> bool:
    return edit.strength == 1.0 and edit.steps == 4


def _mean(values: Tensor) -> str:
    return plus_minus(*mean_and_error(values))


def _difference(values: Tensor, baseline: Tensor) -> str:
    return plus_minus(*mean_and_error(values.double() - baseline.double()), "+")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and writes them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=256, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    given = parser.parse_args(arguments)
    pipe, data = perflow_pipeline(), make_editing_set(given.prompts)
    pipe.set_progress_bar_config(disable=True)
    text = editing_report(pipe, data)
    sys.stdout.write(text + "\n")
    if given.out is not None:
        write(text + "\n", given.out)


if __name__ == "__main__":
    main()
