"""The embedded model in 4, 6 and 8 steps beside its teacher in 50: time and peak memory, whole and by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from perflow_blocks.blocks.inputs import DENOISER_INPUT_FIELDS
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline
from perflow_blocks.demo.models import GUIDANCE_SCALE, LATENT_CHANNELS, LATENT_SIZE
from perflow_blocks.evaluation.samplers import Sampler, perflow_sampler, teacher_sampler

from .measure import Run, Setting, peak_bytes, time_in_turns
from .models import make_pipeline
from .report import Report, megabytes, table

IMAGES, ROUNDS = 8, 11
TEACHER_STEPS, STUDENT_STEPS = 50, (4, 6, 8)
STAGES = ("encode", "denoise", "decode")
WHOLE = "end to end"

TEXT = """The embedded demo model in float32, {images} images in one batch; the teacher is a
`StableDiffusionXLPipeline` with DDIM, the student the preset. NFE counts the rows of the UNet per image. Medians and
quartiles of {rounds} rounds taken in turns, each stage run on what the one before it returned; the last one's images
are those of the end-to-end run."""

MEMORY = """Peak memory of tensors in MB, above what was live before (the weights), in a run apart from the timed ones;
{how}."""

HOW = {
    "cpu": "the sum over torch's own allocations and releases, as its profiler records them",
    "cuda": "`torch.cuda.max_memory_allocated`",
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A way of making images, whole and in stages.

    Attributes:
        sampler: whole, and what to call it.
        stages: by name in `STAGES`; each takes what the one before it returned.
    """

    sampler: Sampler
    stages: Mapping[str, Callable[[Any], Any]]


def run(setting: Setting) -> Iterator[Report]:
    rounds = setting.rounds(ROUNDS)
    runs = make_runs(subjects := make_subjects(setting), setting)
    timings = time_in_turns(runs, setting, rounds=ROUNDS, label="stages")
    peaks = {name: peak_bytes(call, setting.device) for name, call in runs.items()}
    teacher = timings[f"{subjects[0].sampler.label} {WHOLE}"].median
    columns = (*STAGES, WHOLE)
    times = table(
        ("sampler", "guidance", "NFE", *(f"{column} ms" for column in columns), "times as fast"),
        (
            (
                *_head(subject.sampler),
                *(timings[f"{subject.sampler.label} {column}"].milliseconds() for column in columns),
                f"{teacher / timings[f'{subject.sampler.label} {WHOLE}'].median:.2f}",
            )
            for subject in subjects
        ),
    )
    memory = table(
        ("sampler", "guidance", "NFE", *columns),
        (
            (*_head(subject.sampler), *(megabytes(peaks[f"{subject.sampler.label} {column}"]) for column in columns))
            for subject in subjects
        ),
    )
    yield Report(
        title="Stages of the embedded model",
        parts=(
            TEXT.format(images=_images(setting), rounds=rounds),
            times,
            MEMORY.format(how=HOW[setting.device.type]),
            memory,
        ),
    )


def make_subjects(setting: Setting) -> list[Subject]:
    """The teacher, then the student at each number of steps."""
    teacher, student = teacher_pipeline().to(setting.device), perflow_pipeline().to(setting.device)
    for pipe in (teacher, student):
        pipe.set_progress_bar_config(disable=True)
    student(prompt=_prompts(setting), num_inference_steps=4, output="images")  # merges the delta
    text, denoise, decode = split(student)
    steps = 2 if setting.quick else TEACHER_STEPS

    def teacher_latents(embeddings: tuple[Tensor, ...]) -> Tensor:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return teacher(
            **dict(zip(names, embeddings, strict=True)),
            latents=_latents(setting),
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            output_type="latent",
        ).images

    def images(latents: Tensor) -> Tensor:
        return decode(latents=latents, output_type="pt", output="images")

    subjects = [
        Subject(
            sampler=teacher_sampler(teacher, "ddim", steps, GUIDANCE_SCALE),
            stages={"encode": lambda _: _encode(teacher, setting), "denoise": teacher_latents, "decode": images},
        )
    ]
    for steps_of_student in STUDENT_STEPS[:1] if setting.quick else STUDENT_STEPS:

        def student_latents(embeddings: dict[str, Any], steps: int = steps_of_student) -> Tensor:
            return denoise(**embeddings, latents=_latents(setting), num_inference_steps=steps, output="latents")

        subjects.append(
            Subject(
                sampler=perflow_sampler(student, steps_of_student),
                stages={
                    "encode": lambda _: text(prompt=_prompts(setting)).get_by_kwargs(DENOISER_INPUT_FIELDS),
                    "denoise": student_latents,
                    "decode": images,
                },
            )
        )
    return subjects


def make_runs(subjects: list[Subject], setting: Setting) -> dict[str, Run]:
    """What is timed, by sampler and stage: each stage on the result of the one before.

    Raises:
        AssertionError: the stages, one after the other, give other images than the whole.
    """
    runs: dict[str, Run] = {}
    for subject in subjects:
        label = subject.sampler.label
        value: Any = None
        for name, stage in subject.stages.items():
            runs[f"{label} {name}"] = partial(stage, value)
            with torch.no_grad():
                value = stage(value)
        runs[f"{label} {WHOLE}"] = partial(subject.sampler.draw, _prompts(setting), _latents(setting))
        whole = subject.sampler.draw(_prompts(setting), _latents(setting))
        torch.testing.assert_close(value, whole, rtol=0, atol=1e-3, msg=partial("{}: {}".format, label))
    return runs


def split(pipe: Any) -> tuple[Any, Any, Any]:
    """Text encoding, everything in between, and decoding, as pipelines that share the components."""
    blocks = pipe.blocks
    text, decode = blocks.sub_blocks.pop("text_encoder"), blocks.sub_blocks.pop("decode")
    return (
        make_pipeline(text, pipe.components),
        make_pipeline(blocks, pipe.components),
        make_pipeline(decode, pipe.components),
    )


@torch.no_grad()
def _encode(teacher: StableDiffusionXLPipeline, setting: Setting) -> tuple[Tensor, ...]:
    return teacher.encode_prompt(prompt=_prompts(setting), do_classifier_free_guidance=True)


def _head(sampler: Sampler) -> tuple[str, str, int]:
    return sampler.label, f"{sampler.guidance_scale:g}", sampler.nfe


def _images(setting: Setting) -> int:
    return 1 if setting.quick else IMAGES


def _prompts(setting: Setting) -> list[str]:
    return ["a red star on a white background"] * _images(setting)


def _latents(setting: Setting) -> Tensor:
    """The starting noise, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    shape = (_images(setting), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)
    return torch.randn(shape, generator=generator).to(setting.device)
