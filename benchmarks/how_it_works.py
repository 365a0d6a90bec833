"""Draws the figures of `docs/how-it-works.md` from the embedded model's latents and the package's own schedule.

python -m benchmarks.how_it_works --out docs
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from diffusers import DDIMScheduler
from matplotlib.axes import Axes
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image
from torch import Tensor

from perflow_blocks import PeRFlowScheduler
from perflow_blocks.blocks.observers import decode_preview
from perflow_blocks.core.distillation import window_endpoint
from perflow_blocks.core.parameterization import chord_marginal_coefficients, window_coefficients
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline
from perflow_blocks.evaluation.samplers import seeded_latents

PROMPT, SEED, GUIDANCE, TEACHER_STEPS = "a star on a black background", 3, 3.0, 40
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")  # of the windows, noisiest first
STEP_COUNTS = (4, 5, 6, 8)
WINDOW = 2  # the one that is drawn large: its chord and its arc differ visibly
FIGURES = {"how-windows.png": (9.0, 6.6), "how-chord.png": (9.0, 4.6), "how-steps.png": (9.0, 4.0)}
"""Width and height in inches, by the name of the file."""


class Paths(NamedTuple):
    """Latents (steps + 1, channels, height, width) of one prompt from one noise, from t = 1 to t = 0."""

    teacher: Tensor  # in TEACHER_STEPS steps
    hasty: Tensor  # the teacher in as many steps as windows
    student: Tensor  # one step a window
    closer: Tensor  # the student in 6 steps
    images: list[Any]  # what the VAE makes of the student's latents
    scheduler: PeRFlowScheduler  # with the plan of `closer`


def main(out: Annotated[Path, typer.Option(help="The directory of the figures.")] = Path("docs")) -> None:
    """Write the figures."""
    paths = run_models()
    for (name, size), draw in zip(FIGURES.items(), (draw_windows, draw_chord, draw_steps), strict=True):
        figure = plt.figure(figsize=size, layout="constrained", facecolor="white")
        draw(figure, paths)
        figure.savefig(drawn := BytesIO(), dpi=110)
        Image.open(drawn).convert("RGB").quantize(256).save(out / name)  # a third of the size
        plt.close(figure)


def run_models() -> Paths:
    """The embedded teacher and its student, from the same noise."""
    pipe, classic = perflow_pipeline(), teacher_pipeline()
    changes = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": False}
    classic.scheduler = DDIMScheduler.from_config(classic.scheduler.config, **changes)
    noise, windows = seeded_latents(pipe, [SEED]), len(COLORS)

    def path(model: Any, steps: int, **settings: Any) -> Tensor:
        passed = [noise]

        def note(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            passed.append(values["latents"].clone())
            return values

        model.set_progress_bar_config(disable=True)
        size = {"height": 64, "width": 64, "output_type": "latent"}
        model(prompt=PROMPT, latents=noise, num_inference_steps=steps, callback_on_step_end=note, **size, **settings)
        return torch.cat(passed)

    teacher, hasty = (path(classic, steps, guidance_scale=GUIDANCE) for steps in (TEACHER_STEPS, windows))
    student, closer = (path(pipe, steps) for steps in (windows, 6))
    images = decode_preview(pipe.vae, student)
    scheduler = PeRFlowScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(6)
    return Paths(teacher, hasty, student, closer, images, scheduler)


def draw_windows(figure: Any, paths: Paths) -> None:
    """Time in windows, with what the latents look like there; below it both paths in the teacher's plane."""
    top, bottom = figure.subplots(2, 1, height_ratios=(1.0, 2.8))
    boundaries = paths.scheduler.windows.boundaries
    draw_time(top, paths.scheduler)
    for t, image in zip(boundaries, paths.images, strict=True):
        top.add_artist(AnnotationBbox(OffsetImage(np.asarray(image), zoom=0.95), (t, 0.85), pad=0.1))
    top.set(ylim=(-0.35, 1.4))

    flat = paths.teacher.flatten(1)
    centre = flat.mean(0)
    _, spread, axes = torch.linalg.svd(flat - centre, full_matrices=False)
    held = float((spread[:2] ** 2).sum() / (spread**2).sum())
    to_plane = lambda latents: ((latents.flatten(1) - centre) @ axes[:2].T).numpy()  # noqa: E731
    teacher, hasty, student = map(to_plane, (paths.teacher, paths.hasty, paths.student))
    bottom.plot(*teacher.T, color="black", lw=1.5, marker=".", ms=5, label=f"teacher, {TEACHER_STEPS} steps")
    bottom.plot(*hasty.T, color="gray", lw=1.2, ls="--", marker="x", label=f"teacher, {len(COLORS)} steps")
    for k, color in enumerate(COLORS):
        label = f"student, {len(COLORS)} steps: a chord for each window" if k == 0 else None
        bottom.plot(*student[k : k + 2].T, color=color, lw=2.5, marker="o", ms=7, mfc="white", label=label)
    for t, point, aside in zip(boundaries, student, (0, 18, 0, -18, 0), strict=True):
        bottom.annotate(f"t = {t:g}", point, (aside, -18), textcoords="offset points", ha="center", fontsize=11)
    bottom.set(xlabel=f"the plane that holds {held:.1%} of the spread of the teacher's path", xticks=[], yticks=[])
    bottom.set_aspect("equal", adjustable="datalim")
    bottom.legend(fontsize=10)


def draw_time(axis: Axes, scheduler: PeRFlowScheduler) -> None:
    """Time from noise, on the left, to the image, as a bar cut into windows."""
    windows = scheduler.windows
    for k, (start, end) in enumerate(zip(windows.starts, windows.ends, strict=True)):
        axis.barh(0.0, end - start, left=start, height=0.3, color=COLORS[k], edgecolor="white")
        axis.text((start + end) / 2, 0.0, f"window {k}", ha="center", va="center", color="white", fontsize=10)
    axis.set(xlim=(1.07, -0.07), yticks=[], xticks=windows.boundaries)
    axis.set_xlabel("time t, from noise (1) to the image (0)", fontsize=11)
    axis.spines[["top", "left", "right"]].set_visible(False)


def draw_chord(figure: Any, paths: Paths) -> None:
    """All windows, and one of them large, in the plane whose points are so much image and so much noise."""
    whole, large = figure.subplots(1, 2)
    windows = paths.scheduler.windows
    rows = [paths.scheduler.get_window_alpha(start) for start in windows.starts]
    angles = np.linspace(0.0, np.pi / 2, 200)
    for axis in (whole, large):
        axis.plot(np.cos(angles), np.sin(angles), color="black", lw=1.2)
        axis.set_aspect("equal")
        axis.set(xlabel="how much of the image", ylabel="how much of the noise")
        axis.grid(alpha=0.3)
    for k, row in enumerate(rows):
        ends = np.array([chord_marginal_coefficients(row, t) for t in (row.start, row.end)])
        whole.plot(*ends.T, color=COLORS[k], lw=2.5, marker="o", ms=6)
        large.plot(*ends.T, color=COLORS[k], lw=2.5, marker="o", ms=6, alpha=1.0 if k == WINDOW else 0.25)
        whole.annotate(f"t = {row.start:g}", ends[0], (6, 6), textcoords="offset points", fontsize=10)
    whole.annotate("t = 0", ends[1], (6, 6), textcoords="offset points", fontsize=10)
    whole.set(xlim=(-0.05, 1.2), ylim=(-0.05, 1.2), title="four windows")

    row, prediction_type = rows[WINDOW], paths.scheduler.config.prediction_type
    start, end = (np.array(chord_marginal_coefficients(row, t)) for t in (row.start, row.end))
    lam, eta = map(float, window_coefficients(row, prediction_type))
    middle = (float(row.start) + float(row.end)) / 2
    on_chord = np.array(chord_marginal_coefficients(row, middle))
    alpha = float(paths.scheduler.alphas_cumprod[round(middle * len(paths.scheduler)) - 1])
    on_arc = np.array([alpha**0.5, (1.0 - alpha) ** 0.5])
    arrow = {"arrowstyle": "-|>", "lw": 1.6, "shrinkA": 0, "shrinkB": 3}
    large.annotate("", lam * start, start, arrowprops={**arrow, "color": "gray"})
    large.annotate("", lam * start + np.array([0.0, eta]), lam * start, arrowprops={**arrow, "color": "tab:purple"})
    labels = (
        (lam * start, (-14, 2), f"$\\lambda z_s$, $\\lambda$ = {lam:.2f}", "right", "gray"),
        (
            lam * start + np.array([0.0, eta / 2]),
            (8, 0),
            f"$\\eta\\,\\epsilon$,\n$\\eta$ = {eta:.2f}",
            "left",
            "tab:purple",
        ),
        (start, (-8, -12), f"$z_s$, t = {row.start:g}", "right", "black"),
        (end, (8, -12), f"$z_e$,\nt = {row.end:g}", "left", "black"),
        (on_chord, (-8, -24), f"on the chord,\nt = {middle:g}", "right", "black"),
    )
    for place, shift, text, side, color in labels:
        large.annotate(text, place, shift, textcoords="offset points", ha=side, color=color, fontsize=10)
    line = {"arrowstyle": "-", "color": "gray", "shrinkB": 4}
    large.annotate("diffusion at\nthe same t", on_arc, (0.86, 0.76), arrowprops=line, fontsize=10)
    large.plot(*on_chord, "o", color="black", ms=6)
    large.plot(*on_arc, "o", color="black", mfc="white", ms=6)
    large.set(xlim=(0.25, 1.1), ylim=(0.4, 1.4), title=f"window {WINDOW}: from $z_s$ and $\\epsilon$ to $z_e$")


def draw_steps(figure: Any, paths: Paths) -> None:
    """Two steps in the first window, and where step counts put their steps."""
    step, counts = figure.subplots(1, 2, width_ratios=(1.0, 1.5))
    draw_step(step, paths)
    draw_counts(counts, paths.scheduler)


def draw_step(axis: Axes, paths: Paths) -> None:
    """The first window in two steps. Three points define the plane: the start and the two ends that are predicted."""
    plan, latents = paths.scheduler.plan, paths.closer
    assert plan is not None
    ends = []
    for i in (0, 1):
        output = (latents[i + 1] - plan.sample_coeff[i] * latents[i]) / plan.output_coeff[i]
        row = paths.scheduler.get_window_alpha(plan.times[i])
        ends.append(window_endpoint(latents[i], output, row, plan.prediction_type, plan.times[i]))
    start, (first, second) = latents[0], ends
    along = (first - start).flatten()
    unit = along / along.norm()
    aside = (second - first).flatten()
    aside = aside - (aside @ unit) * unit
    other = aside / aside.norm()
    places = [((point - start).flatten() @ unit, (point - start).flatten() @ other) for point in (latents[1], *ends)]
    between, first_end, second_end = ((float(x), float(y)) for x, y in places)
    arrow = {"arrowstyle": "-|>", "lw": 2.2, "color": COLORS[0], "shrinkA": 0, "shrinkB": 0}
    axis.plot((0.0, first_end[0]), (0.0, 0.0), color="gray", lw=1.2, ls="--")
    axis.plot((between[0], second_end[0]), (between[1], second_end[1]), color="gray", lw=1.2, ls="--")
    axis.annotate("", between, (0.0, 0.0), arrowprops=arrow)
    axis.annotate("", second_end, between, arrowprops=arrow)
    for place, text in (((0.0, 0.0), "t = 1"), (between, "t = 0.875")):
        axis.plot(*place, "o", color=COLORS[0], ms=7)
        axis.annotate(text, place, (0, -16), textcoords="offset points", ha="center", fontsize=10)
    axis.plot(*first_end, "o", color="black", mfc="white")
    axis.plot(*second_end, "o", color=COLORS[0], ms=7)
    axis.annotate("end that the\nfirst call sees", first_end, (0, -30), textcoords="offset points", ha="right")
    axis.annotate("t = 0.75, by the\nsecond call", second_end, (0, 8), textcoords="offset points", ha="right")
    stretch = round(0.4 * first_end[0] / second_end[1])
    axis.set_aspect(stretch)
    axis.margins(x=0.12, y=0.5)
    axis.set(xticks=[], yticks=[], title="two steps in window 0", xlabel=f"across the line stretched {stretch} times")


def draw_counts(axis: Axes, scheduler: PeRFlowScheduler) -> None:
    """For each number of steps one row with its timesteps, each step an arrow in the colour of its window."""
    arrow = {"arrowstyle": "-|>", "lw": 2.0, "shrinkA": 0, "shrinkB": 0}
    for height, count in enumerate(reversed(STEP_COUNTS)):
        plan = scheduler.make_plan(count)
        for i, (t, following, k) in enumerate(zip(plan.times, plan.next_times, plan.window_index, strict=True)):
            axis.annotate("", (following, height), (t, height), arrowprops={**arrow, "color": COLORS[k]})
            axis.text(t, height + 0.12, f"{plan.timesteps[i]}", ha="center", fontsize=9)
    for boundary in scheduler.windows.boundaries:
        axis.axvline(boundary, color="gray", lw=0.8, ls=":", zorder=0)
    axis.set(xlim=(1.05, -0.05), ylim=(-0.4, len(STEP_COUNTS) - 0.4), title="timesteps that the UNet is given")
    axis.set_xticks(scheduler.windows.boundaries)
    axis.set_yticks(range(len(STEP_COUNTS)), [f"{count} steps" for count in reversed(STEP_COUNTS)])
    axis.set_xlabel("time t", fontsize=11)
    axis.spines[["top", "left", "right"]].set_visible(False)


if __name__ == "__main__":
    typer.run(main)
