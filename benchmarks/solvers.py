"""What a solver of second order gives teacher and student of the embedded model, and what theta gives.

    python -m benchmarks.solvers teacher student theta --prompts 2048
    python -m benchmarks.solvers training --runs runs/ddim10 runs/second5

`training` compares two finished distillations: the students on the same prompts, and the speed of an update, which is
that of `--timed` where other runs were made side by side for it. Each part writes a section of
`benchmarks/results/solvers.md`, and the others stay.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor

from perflow_blocks.core.distillation import marginal
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline
from perflow_blocks.demo.images import Prompt, Scene, render_scenes
from perflow_blocks.demo.judge import BATCH, make_demo_set
from perflow_blocks.demo.models import GUIDANCE_SCALE
from perflow_blocks.evaluation.measure import Row, differences, evaluate_samplers, mean_and_error, plus_minus
from perflow_blocks.evaluation.samplers import Sampler, perflow_sampler, teacher_sampler
from perflow_blocks.schedulers import PFODESolverSDXL
from perflow_blocks.training.calibration import calibrate_theta

from .report import describe_machine, table, write

RESULT = Path(__file__).parent / "results" / "solvers.md"
SHOWN = ("strict %", "PSNR dB")
WINDOWS = 4
FITTED = 256  # prompts


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def teacher_table(prompts: int) -> str:
    """Relative errors at the ends of the windows, against a solve of 50 calls."""
    pipe, rng = quiet(teacher_pipeline()), np.random.default_rng(7)
    scenes = [Scene.random(rng) for _ in range(prompts)]
    captions = [Prompt.describe(scene, rng).text for scene in scenes]
    pixels = torch.from_numpy(render_scenes(scenes, rng)).float() / 127.5 - 1.0
    with torch.no_grad():
        x0 = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(captions, device=pipe.device)
    conditions = {
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
        "resolution": pixels.shape[-1],
        "guidance_scale": GUIDANCE_SCALE,
        "num_windows": None,
    }
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(7))

    def errors(order: int, calls: int, exact: Sequence[Tensor]) -> float:
        return statistics.mean(
            float((end - other).norm() / other.norm()) for end, other in zip(ends(order, calls), exact, strict=True)
        )

    def ends(order: int, calls: int) -> list[Tensor]:
        solver, found = PFODESolverSDXL(pipe.scheduler, order=order), []
        for k in range(WINDOWS):
            start, end = 1.0 - k / WINDOWS, 1.0 - (k + 1) / WINDOWS
            z = marginal(x0, noise, float(pipe.scheduler.alphas_cumprod[round(1000 * start) - 1]))
            found.append(solver.solve(z, pipe.unet, start, end, num_steps=calls, **conditions))
        return found

    exact = ends(2, 50)
    rows = [(n, *(f"{errors(order, n, exact):.4f}" for order in (1, 2))) for n in (2, 3, 5, 8, 10)]
    head = f"Relative error at the window's end, mean of {WINDOWS} windows and {prompts} images, guidance 3."
    return f"{head}\n\n{table(['calls', 'first order (DDIM)', 'second order'], rows)}"


def student(order: int = 1, theta: Any = None, name: str | None = None, delta: Path | None = None) -> Any:
    """Samplers by number of steps, of a pipeline of their own."""
    pipe = quiet(perflow_pipeline())
    pipe.update_components(solver_order=order, theta=theta)
    return lambda steps: perflow_sampler(pipe, steps, model=name or f"order {order}", delta=delta)


@cache
def reference(prompts: int) -> tuple[Any, Sampler]:
    """The prompts, and the teacher of 50 steps, which draws them once."""
    teacher = teacher_sampler(quiet(teacher_pipeline()), "ddim", 50, GUIDANCE_SCALE)
    drawn: dict[tuple[str, ...], Tensor] = {}

    def draw(texts: Sequence[str], latents: Tensor) -> Tensor:
        key = (*texts, str(float(latents.sum())))
        if key not in drawn:
            drawn[key] = teacher.draw(texts, latents)
        return drawn[key]

    sampler = Sampler(model="teacher", solver="DDIM", steps=50, guidance_scale=GUIDANCE_SCALE, draw=draw)
    return make_demo_set(prompts), sampler


def paired(prompts: int, samplers: Sequence[tuple[Sampler, Sampler]]) -> str:
    """A row for each pair: both means, and the second less the first."""
    data, teacher = reference(prompts)
    found = evaluate_samplers(list(itertools.chain(*samplers)), data, teacher=teacher, batch_size=BATCH)
    rows = [row for row in found if row.sampler is not None and row.sampler.model != "teacher"]
    lines = []
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        lines.append((_label(one), *map(_score(one), SHOWN), "", ""))
        less = differences(other, one)
        lines.append((_label(other), *map(_score(other), SHOWN), *(plus_minus(*less[name], "+") for name in SHOWN)))
    return table(["sampler", "strict %", "PSNR to 50 steps, dB", "strict, difference", "PSNR, difference"], lines)


def _label(row: Row) -> str:
    assert row.sampler is not None
    return f"{row.sampler.model}, {row.sampler.steps} steps"


def _score(row: Row) -> Callable[[str], str]:
    return lambda name: plus_minus(*mean_and_error(row.scores[name]))


def student_table(prompts: int) -> str:
    first, second = student(1), student(2)
    head = f"The embedded model without further network calls; {prompts} prompts, paired with the row before."
    return f"{head}\n\n{paired(prompts, [(first(steps), second(steps)) for steps in (6, 8, 12)])}"


def theta_table(prompts: int) -> str:
    """Fitted for 4 and 8 steps on prompts of another seed."""
    fitting, teacher = make_demo_set(FITTED, seed=31_415, references=2), quiet(teacher_pipeline())
    plain, pairs, lines = student(1, name="no theta"), [], []
    for steps in (4, 8):
        theta = calibrate_theta(
            quiet(perflow_pipeline()), teacher, fitting.prompts, steps, batch_size=64, guidance_scale=GUIDANCE_SCALE
        )
        lines.append(f"{steps} steps: " + "; ".join(f"{a:+.3f}, {b:+.3f}" for a, b in theta))
        pairs.append((plain(steps), student(1, theta, name="theta")(steps)))
    head = f"Theta fitted to {FITTED} prompts by `calibrate_theta`; {prompts} others, paired with the row before."
    return f"{head}\n\n{paired(prompts, pairs)}\n\nTheta of A and B, by window: {'. '.join(lines)}."


def training_table(prompts: int, runs: Sequence[Path], timed: Sequence[Path]) -> str:
    settings = [json.loads(_config(run)) for run in runs]
    samplers = [student(1, name=run.name, delta=run / "delta.safetensors")(WINDOWS) for run in runs]
    optimizer, speeds = settings[0]["optimizer"], [seconds_per_update(run) for run in timed]
    head = (
        f"Two distillations from data, {optimizer['max_steps']} updates of {optimizer['batch_size']}, with "
        f"{' and '.join(_teacher(one) for one in settings)}; {prompts} prompts, paired with the row before."
    )
    speed = f"Seconds an update: {speeds[0]:.2f} and {speeds[1]:.2f}, a ratio of {speeds[1] / speeds[0]:.2f}."
    return f"{head}\n\n{paired(prompts, [(samplers[0], samplers[1])])}\n\n{speed}"


def _config(run: Path) -> str:
    """The settings in a run's report."""
    found = re.search(r"```json\n(.*?)```", (run / "report.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert found is not None
    return found[1]


def _teacher(settings: dict[str, Any]) -> str:
    teacher = settings["teacher"]
    return f"{teacher['steps_per_window']} steps of order {teacher['order']}"


def seconds_per_update(run: Path) -> float:
    """The median over the readings of a run but the first."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    batch = json.loads(_config(run))["optimizer"]["batch_size"]
    return statistics.median(batch / json.loads(line)["samples_per_second"] for line in lines)


PARTS = {"teacher": "Teacher", "student": "Student", "theta": "Theta", "training": "Training"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts and writes their tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--prompts", type=int, default=2048, help="of the judged images (default: %(default)s)")
    parser.add_argument("--runs", type=Path, nargs=2, default=(), help="of training: what two distillations wrote")
    parser.add_argument("--timed", type=Path, nargs=2, help="of training: runs whose speed counts (default: --runs)")
    parser.add_argument("--out", type=Path, default=RESULT, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    if ("training" in options.parts) != bool(options.runs):
        parser.error("--runs goes with training; pass both, or neither")
    for name in options.parts:
        match name:
            case "teacher":
                text = teacher_table(min(options.prompts, 64))
            case "student":
                text = student_table(options.prompts)
            case "theta":
                text = theta_table(options.prompts)
            case _:
                text = training_table(options.prompts, options.runs, options.timed or options.runs)
        _put(options.out, PARTS[name], f"{describe_machine(torch.device('cpu'))}.\n\n{text}")
        sys.stdout.write(f"{text}\n\n")
        sys.stdout.flush()


def _put(path: Path, title: str, text: str) -> None:
    """Replaces a section of the file, or adds it."""
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Solvers of second order, and theta\n"
    kept = re.sub(rf"\n## {title}\n.*?(?=\n## |\Z)", "", whole, flags=re.DOTALL).rstrip()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(f"{kept}\n\n## {title}\n\n{text}\n", path)


if __name__ == "__main__":
    logging.set_verbosity_error()
    main()
