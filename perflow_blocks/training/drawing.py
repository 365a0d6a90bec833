"""Pictures of teacher and student during a training, from the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from ..blocks.auto_blocks import PeRFlowSDXLAutoBlocks
from ..schedulers import PeRFlowScheduler
from .conditioning import cast
from .session import Session
from .straightness import FixedInputs


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


class Painter:
    """Draws fixed inputs with the teacher, once, and with the student, as often as one likes.

    Args:
        session: with both.
        scheduler: the student's.
        guidance_scale: of the student, 1 for none.
    """

    def __init__(self, session: Session, scheduler: PeRFlowScheduler, guidance_scale: float) -> None:
        self._session = session
        self._scheduler = scheduler
        self._guidance_scale = guidance_scale
        self._vae = session.source.load_vae(getattr(torch, session.config.teacher.dtype))

    @torch.no_grad()
    def teacher(self, inputs: FixedInputs, steps: int, guidance_scale: float) -> Tensor:
        """Pictures (count, 3, height, width) in [0, 1] of DDIM in `steps` steps from pure noise to the data."""
        noise = inputs.noise
        times = torch.linspace(1.0, 0.0, steps + 1, device=noise.device)[:, None].expand(-1, len(noise))
        points = self._session.teacher.path(noise, times, inputs.rows, inputs.time_ids, guidance_scale)
        return self._decode(points[-1])

    @torch.no_grad()
    def student(self, student: Any, inputs: FixedInputs, steps: int) -> Tensor:
        """Pictures (count, 3, height, width) in [0, 1] of a bare student, by the pipeline that its users have.

        They are drawn in the student's type and decoded in the VAE's, which a pipeline would not mix.
        """
        encoder = self._session.teacher.encoder
        conditions = cast(encoder.conditioning(inputs.rows, inputs.time_ids), student.dtype)
        empty = cast(encoder.conditioning([encoder.empty] * len(inputs.rows), inputs.time_ids), student.dtype)
        arguments: dict[str, Any] = {
            "prompt_embeds": conditions.prompt_embeds,
            "negative_prompt_embeds": empty.prompt_embeds,
            "latents": inputs.noise.to(student.dtype, copy=True),
            "num_inference_steps": steps,
            "output_type": "latent",
        }
        if self._session.source.family.added_conditions:
            height, width = (side * self._session.source.vae_factor for side in inputs.noise.shape[-2:])
            latents = self._sdxl_pipeline(student)(
                **arguments,
                pooled_prompt_embeds=conditions.added["text_embeds"],
                negative_pooled_prompt_embeds=empty.added["text_embeds"],
                height=height,
                width=width,
                output="images",
            )
        else:
            latents = self._sd_pipeline(student)(**arguments, guidance_scale=self._guidance_scale).images
        return self._decode(latents)

    def _decode(self, latents: Tensor) -> Tensor:
        """Pictures (count, 3, height, width) in [0, 1] of scaled latents (count, 4, height/f, width/f), on the CPU."""
        with self._placed_vae() as vae:
            pictures = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
            return (pictures.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _sdxl_pipeline(self, student: Any) -> Any:
        pipeline = PeRFlowSDXLAutoBlocks().init_pipeline()
        pipeline.update_components(
            unet=student,
            vae=self._vae,
            scheduler=self._scheduler,
            guidance_scale=self._guidance_scale,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _sd_pipeline(self, student: Any) -> Any:
        pipeline: Any = StableDiffusionPipeline(
            vae=self._vae,
            text_encoder=None,
            tokenizer=None,
            unet=student,
            scheduler=self._scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @contextmanager
    def _placed_vae(self) -> Iterator[Any]:
        """The VAE on the device, which it leaves again: the training has its own, or none."""
        try:
            yield self._vae.to(self._session.accelerator.device)
        finally:
            self._vae.to("cpu")
