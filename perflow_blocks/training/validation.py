"""Looking at the student while it is trained: pictures beside the teacher's, and how straight its paths are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.utils.pil_utils import numpy_to_pil
from PIL import Image
from torch import Tensor

from ..atomic_files import atomic_path
from ..evaluation.sheet import contact_sheet
from .drawing import Painter, resulting_student
from .families import LATENT_CHANNELS
from .layout import READINGS, sheet_path
from .loop import Observer
from .progress import MetricsFile
from .result import make_scheduler, recipe_of
from .session import Session, is_sharded
from .straightness import FixedInputs, StraightnessProbe

logger = logging.get_logger(__name__)

_SEED = 1_000_000_007  # of the noise: no training is likely to have it


class Validation(Observer):
    """Validates as `output.validation_every` says; does nothing without it. The main process does it alone."""

    def __init__(self) -> None:
        self._at_work: _AtWork | None = None

    def started(self, session: Session, step: int) -> None:
        output = session.config.output
        if output.validation_every is None or not session.accelerator.is_main_process:
            return
        if is_sharded(session.accelerator):
            logger.warning("there is no validation, which needs all weights of the student in one process.")
            return
        self._at_work = _prepare(session, MetricsFile(Path(output.directory), step, READINGS))
        if step == 0:
            self._at_work.validate(0)

    def updated(self, session: Session, step: int) -> None:
        every = session.config.output.validation_every
        last = step == session.config.optimizer.max_steps
        if self._at_work is not None and every is not None and (last or step % every == 0):
            self._at_work.validate(step)


@dataclass(frozen=True, kw_only=True)
class _AtWork:
    """What is kept between validations: the inputs, and what the teacher made of them."""

    session: Session
    inputs: FixedInputs
    painter: Painter
    probe: StraightnessProbe
    teacher_pictures: Tensor
    readings: MetricsFile

    def validate(self, step: int) -> None:
        session = self.session
        with resulting_student(session) as student:
            reading = self.probe.measure(student, step)
            pictures = {number: self._draw(student, number) for number in student_steps(session)}
        self.readings.append(reading)
        sheet = self._sheet(step, pictures)
        with atomic_path(sheet_path(Path(session.config.output.directory), step)) as temporary:
            sheet.save(temporary, format="PNG")
        session.accelerator.log(reading.figures(), step=step)
        log_picture(session.accelerator, sheet, step)

    def _draw(self, student: Any, steps: int) -> Tensor:
        size = self.session.config.optimizer.batch_size
        return torch.cat([self.painter.student(student, chunk, steps) for chunk in self.inputs.chunks(size)])

    def _sheet(self, step: int, pictures: dict[int, Tensor]) -> Image.Image:
        teacher_steps = self.session.config.output.validation_teacher_steps
        columns = {f"teacher, {teacher_steps} steps": self.teacher_pictures}
        columns |= {f"student, {number} steps": drawn for number, drawn in pictures.items()}
        images, captions = [], []
        for row, prompt in enumerate(self.inputs.prompts):
            for name, drawn in columns.items():
                images.append(_image(drawn[row]))
                captions.append(f"{name}\n{prompt}" if drawn is self.teacher_pictures else name)
        return contact_sheet(images, captions, columns=len(columns), title=f"after {step} updates")


def student_steps(session: Session) -> tuple[int, ...]:
    """The numbers of steps that the student is shown in."""
    windows = session.geometry.num_windows
    return session.config.output.validation_steps or tuple(dict.fromkeys((windows, windows * 3 // 2, windows * 2)))


def fixed_inputs(session: Session) -> FixedInputs:
    """The validation's prompts with noise for pictures of the data's resolution, the same in every run."""
    prompts, side = session.config.output.validation_prompts, session.config.data.resolution
    encoder, count = session.teacher.encoder, len(prompts)
    latent_side = side // session.source.vae_factor
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(count, LATENT_CHANNELS, latent_side, latent_side, generator=generator)
    return FixedInputs(
        prompts=prompts,
        rows=encoder.rows(prompts),
        time_ids=encoder.time_ids([(side, side)] * count, [(0, 0)] * count, [(side, side)] * count),
        noise=noise.to(session.accelerator.device),
    )


def log_picture(accelerator: Any, picture: Image.Image, step: int) -> None:
    """Shows a picture in the trackers that there are."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": np.asarray(picture)[None]}, step=step, dataformats="NHWC")
        else:
            tracker.log_images({"validation": [picture]}, step=step)


def _prepare(session: Session, readings: MetricsFile) -> _AtWork:
    config, recipe = session.config, recipe_of(session)
    inputs, size = fixed_inputs(session), config.optimizer.batch_size
    painter = Painter(session, make_scheduler(session), recipe.guidance_scale or 1.0)
    fixed = config.teacher.cfg_mode == "fixed"
    guidance_scale = config.teacher.guidance_scale if fixed else session.source.family.guidance_scale
    steps = config.output.validation_teacher_steps
    pictures = [painter.teacher(chunk, steps, guidance_scale) for chunk in inputs.chunks(size)]
    return _AtWork(
        session=session,
        inputs=inputs,
        painter=painter,
        probe=StraightnessProbe(session.teacher, inputs, size),
        teacher_pictures=torch.cat(pictures),
        readings=readings,
    )


def _image(picture: Tensor) -> Image.Image:
    """(3, height, width) in [0, 1] as a picture."""
    return numpy_to_pil(picture.permute(1, 2, 0)[None].numpy())[0]
