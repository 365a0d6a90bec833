"""Image-to-image and inpainting with a PeRFlow pipeline: draws a set of edits, judges and compares the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm.auto import tqdm

from ..demo.models import VAE_FACTOR
from .classifier import ShapeClassifier
from .comparison import reconstruct
from .editing_set import EditingSet
from .judge import Verdicts, judge

_BATCH = 32


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
        pictures: (count, 3, 64, 64) in [0, 1].
        change: final latents less the encoded input, (count, 4, 16, 16); None for text-to-image.
        steps: how many were run.
        noise_to_signal: Q / P of the noised input `P x0 + Q noise` that the run started from; None for text-to-image.
    """

    pictures: Tensor
    change: Tensor | None
    steps: int
    noise_to_signal: float | None


@dataclass(frozen=True, kw_only=True)
class Known:
    """What became of the part outside a hole; one entry for each picture.

    Attributes:
        pixels: pixels whose 8-bit values changed.
        difference: mean absolute difference of its pixels, in levels of 255.
        latents: latent values that changed.
    """

    pixels: Tensor
    difference: Tensor
    latents: Tensor


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The measures of one edit; tensors have one entry for each picture.

    Attributes:
        verdicts: against the prompts of the edit.
        psnr: of picture to input, in decibels.
        difference: mean absolute difference of picture and input, in levels of 255.
        steps: how many were run; 0 where nothing was drawn.
        noise_to_signal: as in `Drawn`.
        latent_distance: root mean square change of the latents; None for text-to-image.
        known: the part outside the hole; None without one.
    """

    verdicts: Verdicts
    psnr: Tensor
    difference: Tensor
    steps: int = 0
    noise_to_signal: float | None = None
    latent_distance: Tensor | None = None
    known: Known | None = None


def evaluate_edits(
    pipe: Any, data: EditingSet, edits: Sequence[Edit], classifier: ShapeClassifier
) -> dict[Edit, Outcome]:
    """Draws the whole set with every edit and measures the results."""
    outcomes = {}
    with tqdm(total=len(edits) * len(data), desc="edit", unit="picture") as progress:
        for edit in edits:
            progress.set_postfix_str(edit.label)
            parts = []
            for start in range(0, len(data), _BATCH):
                parts.append(draw(pipe, data, edit, slice(start, start + _BATCH)))
                progress.update(len(parts[-1].pictures))
            outcomes[edit] = measure(_joined(parts), data, edit, classifier)
    return outcomes


def draw(pipe: Any, data: EditingSet, edit: Edit, chunk: slice) -> Drawn:
    """Draws the pictures of the set that `chunk` names, in one batch.

    Args:
        pipe: a pipeline of PeRFlow blocks with all components loaded.
        data: inputs, prompts, masks and noise.
        edit: what to do.
        chunk: which pictures.
    """
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
        pictures=drawn["images"].float().cpu(),
        change=(drawn["latents"] - drawn["image_latents"]).float().cpu() if edit.strength is not None else None,
        steps=len(drawn["step_plan"]),
        noise_to_signal=sigma / signal if edit.strength is not None else None,
    )


def measure(drawn: Drawn, data: EditingSet, edit: Edit, classifier: ShapeClassifier) -> Outcome:
    """Judges the pictures of the whole set and compares them with the inputs."""
    outcome = replace(
        measure_pictures(drawn.pictures, data, edit.wording, classifier),
        steps=drawn.steps,
        noise_to_signal=drawn.noise_to_signal,
    )
    if drawn.change is None:
        return outcome
    outcome = replace(outcome, latent_distance=drawn.change.square().mean((1, 2, 3)).sqrt())
    if edit.hole is None:
        return outcome
    outside = ~data.painted(edit.hole)
    latents_outside = outside[..., ::VAE_FACTOR, ::VAE_FACTOR]  # holes consist of whole latents
    levels, given = 255.0 * drawn.pictures, 255.0 * data.pixels()
    known = Known(
        pixels=((levels.round() != given.round()).any(1, keepdim=True) & outside).sum((1, 2, 3)),
        difference=((levels - given).abs() * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3))),
        latents=((drawn.change != 0) & latents_outside).sum((1, 2, 3)),
    )
    return replace(outcome, known=known)


def measure_pictures(pictures: Tensor, data: EditingSet, wording: str, classifier: ShapeClassifier) -> Outcome:
    """The measures that need nothing but pictures (count, 3, 64, 64) in [0, 1]."""
    error = pictures - data.pixels()
    return Outcome(
        verdicts=judge(pictures, data.prompts[wording], classifier),
        psnr=peak_signal_to_noise(error),
        difference=255.0 * error.abs().mean((1, 2, 3)),
    )


def measure_floors(vae: AutoencoderKL, data: EditingSet, classifier: ShapeClassifier) -> dict[str, Outcome]:
    """What drawing nothing gives: `decoded`, inputs encoded and decoded, and `blank`, their half hole left flat."""
    inputs = data.pixels()
    blank = torch.where(data.painted("half"), inputs[..., :1, :1], inputs)
    return {
        "decoded": measure_pictures(reconstruct(vae, inputs), data, "own", classifier),
        "blank": measure_pictures(blank, data, "own", classifier),
    }


def peak_signal_to_noise(error: Tensor) -> Tensor:
    """Decibels (count,) of errors (count, 3, height, width) of pictures in [0, 1]; at most 96."""
    return -10.0 * error.square().mean((1, 2, 3)).clamp(min=10.0**-9.6).log10()


def _joined(parts: Sequence[Drawn]) -> Drawn:
    changes = [part.change for part in parts if part.change is not None]
    return replace(
        parts[0],
        pictures=torch.cat([part.pictures for part in parts]),
        change=torch.cat(changes) if changes else None,
    )
