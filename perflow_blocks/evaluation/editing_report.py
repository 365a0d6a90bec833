"""The report on image-to-image and inpainting: which edits are drawn, their tables, a sheet of examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from ..demo.models import LATENT_CHANNELS, VAE_FACTOR
from .classifier import ShapeClassifier
from .editing import Edit, Outcome, draw, evaluate_edits, measure_floors
from .editing_set import WORDINGS, EditingSet
from .judge import paired_difference, proportion
from .sheet import contact_sheet

STRENGTHS = (0.3, 0.5, 0.8)
INSIDE_WINDOWS = (0.1, 0.3, 0.4, 0.6, 0.8, 0.9)
"""Strengths at which chord and marginal differ; at window boundaries they are one."""
CHANGED = {"color": "another colour", "shape": "another shape", "both": "both"}
HOLES = {"tight": "both", "wide": "both", "half": "own"}
"""The wording of the prompt for each hole: the half that is kept may show a part of the input's shape."""

Outcomes = Mapping[Edit, Outcome]


def editing_report(pipe: Any, data: EditingSet, classifier: ShapeClassifier) -> str:
    """Draws every edit of the tables and writes them as Markdown."""
    outcomes = evaluate_edits(pipe, data, planned_edits(), classifier)
    floors = measure_floors(pipe.vae, data, classifier)
    parts = [
        "# Image-to-image and inpainting with the embedded model",
        f"{len(data)} rendered inputs, seed {data.seed}, the same prompts and noise in every row; ± is one standard "
        f"error. Made by `perflow evaluate --editing --prompts {len(data)}`. The judge is that of the evaluation: "
        "accurate is a picture in which everything named is right, strict one whose colours are clean as well.",
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
        "shape and colour on the same background. For the half picture it names what the input shows. Beside each "
        "the paired difference to text-to-image with the same prompts and noise.",
        hole_table(outcomes, data),
        f"With the half hole left flat, in the background's colour, {_percent(floors['blank'].verdicts.accurate)} % "
        "are accurate.",
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
    return _table(
        header,
        (
            [
                name,
                str(outcome.steps or "-"),
                _mean(outcome.psnr),
                _mean(outcome.difference),
                "-" if outcome.latent_distance is None else _mean(outcome.latent_distance, digits=3),
                _percent(outcome.verdicts.accurate),
                _percent(outcome.verdicts.strict),
            ]
            for name, outcome in rows
        ),
    )


def wording_table(outcomes: Outcomes) -> str:
    rows = [[f"strength {s:g}" if s else "text-to-image"] for s in (*STRENGTHS, None)]
    for row, s in zip(rows, (*STRENGTHS, None), strict=True):
        row += [_percent(outcomes[Edit(wording=wording, strength=s)].verdicts.accurate) for wording in CHANGED]
    return _table(["", *CHANGED.values()], rows)


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
                _difference(chord.psnr, marginal.psnr, digits=3),
                _difference(100 * chord.verdicts.accurate, 100 * marginal.verdicts.accurate),
                _difference(100 * chord.verdicts.strict, 100 * marginal.verdicts.strict),
            ]
        )
    both = [f"{name}, chord / marginal" for name in ("noise : signal", "PSNR dB")]
    return _table(["", "strength", "steps run", *both, "PSNR", "accuracy %", "strict %"], rows)


def hole_table(outcomes: Outcomes, data: EditingSet) -> str:
    rows = []
    for edit in hole_edits():
        outcome, whole = outcomes[edit], outcomes[Edit(wording=edit.wording)]
        rows.append(
            [
                f"{edit.hole}, {100 * float(data.painted(str(edit.hole)).float().mean()):.0f} % of the picture",
                f"{edit.strength:g}",
                str(outcome.steps),
                _percent(outcome.verdicts.accurate),
                _difference(100 * outcome.verdicts.accurate, 100 * whole.verdicts.accurate),
                _percent(outcome.verdicts.strict),
                _difference(100 * outcome.verdicts.strict, 100 * whole.verdicts.strict),
            ]
        )
    header = ["hole", "strength", "steps", "accuracy %", "to text-to-image", "strict %", "to text-to-image"]
    return _table(header, rows)


def known_table(outcomes: Outcomes, data: EditingSet) -> str:
    rows = []
    for edit in filter(_first_of_hole, hole_edits()):
        kept, decoded = outcomes[edit].known, outcomes[replace(edit, keep_known_pixels=False)].known
        assert edit.hole and kept and decoded
        pixels = int((~data.painted(edit.hole)).sum())
        rows.append(
            [
                edit.hole,
                f"{int(kept.latents.sum()):,} of {pixels * LATENT_CHANNELS // VAE_FACTOR**2:,}",
                f"{int(kept.pixels.sum()):,} of {pixels:,}",
                f"{int(decoded.pixels.sum()):,} of {pixels:,}",
                _mean(decoded.difference),
            ]
        )
    header = ["hole", "latent values changed", "pixels changed", "decoded alone: pixels changed", "by levels"]
    return _table(header, rows)


def editing_sheet(pipe: Any, data: EditingSet) -> Image.Image:
    """Examples, the first two pictures of the set: image-to-image with both prompts, then each kind of hole."""
    images: list[Image.Image] = []
    captions: list[str] = []
    for wording in ("own", "both"):
        for number in (0, 1):
            edits = [Edit(wording=wording, strength=s) for s in STRENGTHS]
            images += [data.inputs[number], *(_one(pipe, data, edit, number) for edit in edits)]
            captions += [
                f"input; prompt: {data.prompts[wording][number].text}",
                *(f"strength {s:g}" for s in STRENGTHS),
            ]
    for hole, wording in HOLES.items():
        for number in (0, 1):
            edits = [Edit(wording=wording, hole=hole, strength=s) for s in (1.0, 0.8)]
            shown = data.masks[hole][number].point(lambda value: 200 * value // 255)  # white has no edge on the sheet
            images += [data.inputs[number], shown]
            images += [_one(pipe, data, edit, number) for edit in edits]
            captions += [f"input; prompt: {data.prompts[wording][number].text}", f"{hole} hole (light)"]
            captions += ["inpainted, strength 1", "inpainted, strength 0.8"]
    title = (
        "Image-to-image, then inpainting, on a schedule of four steps: the first two pictures of the set, not picked."
    )
    return contact_sheet(images, captions, columns=8, scale=2, title=title)


def _one(pipe: Any, data: EditingSet, edit: Edit, number: int) -> Image.Image:
    pictures = draw(pipe, data, edit, slice(number, number + 1)).pictures
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pictures))[0]


def _first_of_hole(edit: Edit) -> bool:
    return edit.strength == 1.0 and edit.steps == 4


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(hits: Tensor) -> str:
    share, error = proportion(hits)
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def _mean(values: Tensor, *, digits: int = 2) -> str:
    mean, error = float(values.double().mean()), float(values.double().std()) / math.sqrt(len(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def _difference(values: Tensor, baseline: Tensor, *, digits: int = 1) -> str:
    mean, error = paired_difference(values, baseline)
    return f"{mean:+.{digits}f} ± {error:.{digits}f}"
