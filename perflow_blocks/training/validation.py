"""Validation during a training: sheets of images, teacher beside student, and how far one step is from the teacher.

The loss says how far the student's outputs are from the teacher's lines at points on those lines. Sampling needs to
end where the teacher does, so each window's end after one step of the student is compared with the teacher's.
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
from .teacher import Teacher, WindowGeometry

logger = logging.get_logger(__name__)

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
        if self._every and session.is_sharded:
            logger.warning("validation is left out: it needs all weights of the student in one process.")
            self._every = None
        if not self._every:
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
        images, captions, errors = [], [], []
        with resulting_student(session) as student:
            for inputs, edges, image in zip(self._inputs, self._edges, self._images, strict=True):
                drawn = [student_latents(student, teacher, scheduler, inputs, n, scale) for n in self._steps]
                images += [image, *map(self._decode, drawn)]
                captions += [f"{names[0]}\n{inputs.prompt}", *names[1:]]
                errors.append(endpoint_errors(student, teacher.geometry, inputs, edges))
        figures = ratios(errors)
        append_line(directory / READINGS, {"step": step, "endpoint_error": figures})
        sheet = contact_sheet(images, captions, columns=len(names), title=f"after {step} updates")
        with atomic_path(sheet_path(directory, step)) as temporary:
            sheet.save(temporary, format="PNG")
        session.accelerator.log({f"endpoint_error/window_{i}": value for i, value in enumerate(figures)}, step=step)
        for tracker in session.accelerator.trackers:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(sheet)[None]}, step=step, **options)

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Any:
        """The image of latents (1, channels, height, width), by a VAE that waits on the host if there is one."""
        image = latents
        if self._vae is not None:
            vae: Any = self._vae.to(latents.device)
            image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            vae.to("cpu")
        return numpy_to_pil((image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy())[0]


def fixed_inputs(session: Session) -> list[Inputs]:
    """The validation's prompts with noise for images of the data's resolution, the same in every run."""
    side, prompts = session.config.data.resolution, session.config.output.validation_prompts
    latents, generator = side // session.source.vae_factor, torch.Generator().manual_seed(_SEED)
    noise = torch.randn(len(prompts), session.source.channels, latents, latents, generator=generator)
    sizes, encoder = [((side, side), (0, 0), (side, side))], session.teacher.encoder
    return [
        Inputs(prompt, encoder.conditioning([prompt], sizes), z[None].to(session.accelerator.device))
        for prompt, z in zip(prompts, noise, strict=True)
    ]


@contextmanager
def resulting_student(session: Session) -> Iterator[Any]:
    """The bare student as it would be saved now: its averaged weights, in evaluation mode. Leaves it as it was."""
    student, ema = session.accelerator.unwrap_model(session.student), session.ema
    trained, was_training = list(session.trained.values()), student.training
    if ema is not None:
        ema.store(trained)
        ema.copy_to(trained)
    try:
        yield student.eval()
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
