"""Validation during a training: sheets of images, teacher beside student, and how straight the student's paths are.

The loss says how far the student's outputs are from the teacher's lines at points on those lines. Sampling needs paths
that are straight, since then more steps change nothing, and that end where the teacher's do. The straightness of
rectified flow (arXiv 2209.03003, section 2) over a window from s (start) to e (end),

    S = 1/|e - s| int E ||(z_e - z_s)/(e - s) - dz_t/dt||^2 dt,

is divided here by E ||(z_e - z_s)/(e - s)||^2, so that it has no unit. At 0 one Euler step solves the window exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.utils.pil_utils import numpy_to_pil
from torch import Tensor

from ..atomic_files import atomic_path
from ..core.distillation import window_endpoint
from ..evaluation.sheet import contact_sheet
from ..schedulers import PeRFlowScheduler
from ..schedulers.pfode_solver import Conditioning
from .checkpoints import READINGS, append_line, sheet_path
from .loop import Observer, Session
from .output import make_scheduler, recipe_of
from .pairs import UNet, predict
from .teacher import LATENT_CHANNELS, Teacher, WindowGeometry

logger = logging.get_logger(__name__)

PATH_STEPS = 8
"""Euler steps in which the student's path through a window is followed."""
_SEED = 1_000_000_007  # of the noise: no training is likely to have it


class Inputs(NamedTuple):
    """A prompt and noise (1, channels, height, width) that stay the same during a training."""

    prompt: str
    conditioning: Conditioning
    noise: Tensor


class Validation(Observer):
    """Validates as `output.validation_every` says; does nothing without it. The main process does it alone."""

    def started(self, session: Session, step: int) -> None:
        output, windows = session.config.output, session.geometry.num_windows
        self._every = output.validation_every if session.accelerator.is_main_process else None
        if self._every is not None and session.is_sharded:
            logger.warning("there is no validation, which needs all weights of the student in one process.")
            self._every = None
        if self._every is None:
            return
        self._steps = output.validation_steps or tuple(dict.fromkeys((windows, windows * 3 // 2, windows * 2)))
        self._vae = session.source.load_vae(getattr(torch, session.config.teacher.dtype))
        self._inputs = fixed_inputs(session)
        self._edges = [teacher_edges(session.teacher, inputs) for inputs in self._inputs]
        self._images = [self._decode(teacher_latents(session, inputs)) for inputs in self._inputs]
        if step == 0:
            self._validate(session, 0)

    def updated(self, session: Session, step: int) -> None:
        last = step == session.config.optimizer.max_steps
        if self._every is not None and (last or step % self._every == 0):
            self._validate(session, step)

    @torch.no_grad()
    def _validate(self, session: Session, step: int) -> None:
        directory, teacher = Path(session.config.output.directory), session.teacher
        scheduler, scale = make_scheduler(session), recipe_of(session).guidance_scale or 1.0
        names = [f"teacher, {session.config.output.validation_teacher_steps} steps"]
        names += [f"student, {number} steps" for number in self._steps]
        images, captions, bends, errors = [], [], [], []
        with resulting_student(session) as student:
            for inputs, edges, image in zip(self._inputs, self._edges, self._images, strict=True):
                drawn = [student_latents(student, teacher, scheduler, inputs, n, scale) for n in self._steps]
                images += [image, *map(self._decode, drawn)]
                captions += [f"{names[0]}\n{inputs.prompt}", *names[1:]]
                bends.append(straightness(student, teacher.geometry, inputs))
                errors.append(endpoint_errors(student, teacher.geometry, inputs, edges))
        reading = {"straightness": ratios(bends), "endpoint_error": ratios(errors)}
        append_line(directory / READINGS, {"step": step, **reading})
        sheet = contact_sheet(images, captions, columns=len(names), title=f"after {step} updates")
        with atomic_path(sheet_path(directory, step)) as temporary:
            sheet.save(temporary, format="PNG")
        figures = {f"{name}/window_{i}": value for name, row in reading.items() for i, value in enumerate(row)}
        session.accelerator.log(figures, step=step)
        for tracker in session.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"validation": [sheet]}, step=step)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Any:
        """The image of latents (1, channels, height, width), by a VAE that waits on the host."""
        vae: Any = self._vae.to(latents.device)
        image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        vae.to("cpu")
        return numpy_to_pil((image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())[0]


def fixed_inputs(session: Session) -> list[Inputs]:
    """The validation's prompts with noise for images of the data's resolution, the same in every run."""
    side, prompts = session.config.data.resolution, session.config.output.validation_prompts
    latents, generator = side // session.source.vae_factor, torch.Generator().manual_seed(_SEED)
    noise = torch.randn(len(prompts), LATENT_CHANNELS, latents, latents, generator=generator)
    sizes, encoder = [((side, side), (0, 0), (side, side))], session.teacher.encoder
    return [
        Inputs(prompt, encoder.conditioning([prompt], sizes), z[None].to(session.accelerator.device))
        for prompt, z in zip(prompts, noise, strict=True)
    ]


@contextmanager
def resulting_student(session: Session) -> Iterator[Any]:
    """The bare student as it would be saved now: its averaged weights, in evaluation mode. Leaves it as it was."""
    student = session.accelerator.unwrap_model(session.student)
    trained, ema, was_training = list(session.trained.values()), session.ema, student.training
    if ema is not None:
        ema.store(trained)
    student.eval()
    try:
        if ema is not None:
            ema.copy_to(trained)
        yield student
    finally:
        student.train(was_training)
        if ema is not None:
            ema.restore(trained)


def teacher_latents(session: Session, inputs: Inputs) -> Tensor:
    """The teacher's, by guided DDIM from pure noise to the data."""
    config, one = session.config, torch.ones(1, device=inputs.noise.device)
    fixed = config.teacher.cfg_mode == "fixed"
    scale = config.teacher.guidance_scale if fixed else session.source.family.guidance_scale
    steps = {"num_steps": config.output.validation_teacher_steps, "num_windows": None}
    return session.teacher.solve_between(inputs.noise, one, 0 * one, inputs.conditioning, scale, **steps)


def student_latents(
    student: UNet, teacher: Teacher, scheduler: PeRFlowScheduler, inputs: Inputs, steps: int, scale: float
) -> Tensor:
    """The student's, with guidance for a scale above 1, as a pipeline samples them."""
    z, conditions = inputs.noise, inputs.conditioning
    if scale > 1.0:
        conditions = conditions.join(teacher.encoder.empty(conditions))
    rows = len(conditions.prompt_embeds)
    scheduler.set_timesteps(steps, z.device)
    for t in scheduler.timesteps:
        output = predict(student, z.expand(rows, -1, -1, -1), t.expand(rows), conditions).float()
        guided = output[-1:] + scale * (output[:1] - output[-1:])  # of one row: that row
        z = scheduler.step(guided, t, z).prev_sample
    return z


def teacher_edges(teacher: Teacher, inputs: Inputs) -> list[Tensor]:
    """Where the teacher is at the windows' edges, from the noise to the data, solved as for training."""
    edges = [inputs.noise]
    for window in teacher.geometry.each(1):
        edges.append(teacher.solve(edges[-1], window, inputs.conditioning))
    return edges


def straightness(student: UNet, geometry: WindowGeometry, inputs: Inputs) -> Tensor:
    """Of the student's own path from pure noise through all windows, (windows, 2): how far its velocity is from the
    chord's, and the chord's, both as mean squares."""
    z, found = inputs.noise, []
    for window in geometry.each(1):
        length, velocities = torch.as_tensor(window.end - window.start), []
        for number in range(PATH_STEPS):
            t = window.start + length * (number / PATH_STEPS)
            output = predict(student, z, t * geometry.num_train_timesteps, inputs.conditioning).float()
            end = window_endpoint(z, output, window, geometry.config.prediction_type, t)
            velocities.append((end - z) / (window.end - t))
            z = z + velocities[-1] * (length / PATH_STEPS)
        path = torch.stack(velocities)
        found.append(torch.stack([path.var(0, unbiased=False).mean(), path.mean(0).square().mean()]))
    return torch.stack(found)


def endpoint_errors(student: UNet, geometry: WindowGeometry, inputs: Inputs, edges: list[Tensor]) -> Tensor:
    """Of each window, (windows, 2): the squared distance between where one step of the student and where the teacher
    end, both from the teacher's start, and the squared length of the teacher's chord."""
    found = []
    for window, z_start, z_end in zip(geometry.each(1), edges, edges[1:], strict=False):
        timestep = torch.as_tensor(window.start * geometry.num_train_timesteps)
        output = predict(student, z_start, timestep, inputs.conditioning).float()
        own = window_endpoint(z_start, output, window, geometry.config.prediction_type)
        found.append(torch.stack([(own - z_end).square().mean(), (z_end - z_start).square().mean()]))
    return torch.stack(found)


def ratios(parts: list[Tensor]) -> list[float]:
    """For each window the ratio of two figures (windows, 2), each summed over the parts."""
    above, below = torch.stack(parts).sum(0).unbind(1)
    return (above / below).tolist()
