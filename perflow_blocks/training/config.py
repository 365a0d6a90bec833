"""What a distillation is told: frozen sections of settings, each of which checks itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..core.parameterization import PredictionType
from ..core.windows import TimeWindows, tile_windows
from .data.config import DEMO_PICTURE_SIZE, DataConfig, value_problems
from .rules import ConfigError, at_least, not_negative, positive, share, share_below_one

DTypeName = Literal["float32", "float16", "bfloat16"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]

_SEEDS = 2**64  # as many as torch's generators take
_POLYNOMIAL_END = 1e-7  # the rate at which diffusers' polynomial schedule ends


class Section:
    """A part of the configuration. Values that break its rules raise a `ConfigError` that names all of them."""

    paths: ClassVar[tuple[str, ...]] = ()
    """Fields that may hold a path, of which a leading ~ stands for the home directory."""

    def problems(self) -> Iterator[str]:
        """A sentence for each rule that is broken."""
        yield from ()

    def __post_init__(self) -> None:
        for name in self.paths:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(value))
        found = list(self.problems())
        if found:
            raise ConfigError(found)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Teacher and student.

    Attributes:
        teacher: repository or directory of a Stable Diffusion pipeline (a folder for each part), a checkpoint in one
            file, or "demo" for the embedded model.
        revision: of the repository.
        variant: of the weight files, "fp16" say.
        config: for a single file, repository or directory with the configurations of its parts.
        student: "full" trains all weights, "lora" low-rank factors beside them.
        lora_rank: rank of the factors; they are applied with factor 1.
        lora_targets: names of the UNet's layers, or their ends, that get factors. By default all linear layers and
            convolutions of its transformer and residual blocks.
        init_student: directory of a UNet to start from instead of the teacher's weights.
        frozen: patterns such as "*transformer_blocks*" of the weights of a full student that stay as they are. They
            are no part of the delta, whose file gets smaller by them, and neither gradients nor averages are kept.
    """

    paths = ("teacher", "config", "init_student")

    teacher: str
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    student: Literal["full", "lora"] = "full"
    lora_rank: int = 64
    lora_targets: tuple[str, ...] | None = None
    init_student: str | None = None
    frozen: tuple[str, ...] = ()

    def problems(self) -> Iterator[str]:
        if not self.teacher.strip():
            yield "model.teacher is empty; name a repository, a directory or a checkpoint, or demo."
        yield from at_least(1, **{"model.lora_rank": self.lora_rank})
        if self.lora_targets == ():
            yield "model.lora_targets is empty; name layers such as to_q, or leave it out."
        if self.student == "lora" and self.init_student is not None:
            yield "model.init_student is for full weights; leave it out, or pass model.student=full."
        if self.student == "lora" and self.frozen:
            yield "model.frozen is for full weights; name the layers that get factors in model.lora_targets instead."


@dataclass(frozen=True, kw_only=True)
class WindowConfig(Section):
    """The student's windows and the times at which it is trained.

    Attributes:
        num_time_windows: number of equal windows.
        window_boundaries: descending times from 1 to 0 for unequal windows; they decide the number.
        prediction_type: what the student predicts: "ddim_eps" (SDXL), "diff_eps" (SD 1.5) or "velocity" (SD 2.1).
        times: "continuous", or "discrete" for `num_discrete_times` equidistant ones.
        num_discrete_times: how many those are over all windows.
        start_share: share in [0, 1) of the times that lie at their window's start, beside those drawn evenly.
        zero_snr_start: noised starts at t = 1 are pure noise, without the trace of the picture that the schedule
            leaves there.
    """

    num_time_windows: int = 4
    window_boundaries: tuple[float, ...] | None = None
    prediction_type: PredictionType = "ddim_eps"
    times: Literal["continuous", "discrete"] = "continuous"
    num_discrete_times: int = 200
    start_share: float = 0.0
    zero_snr_start: bool = False

    def problems(self) -> Iterator[str]:
        try:
            count = self.tile().num_windows
        except ValueError as error:
            yield f"windows: {error}"
        else:
            yield from at_least(count, **{"windows.num_discrete_times": self.num_discrete_times})
        yield from share_below_one(**{"windows.start_share": self.start_share})

    def tile(self, num_train_timesteps: int = 1000) -> TimeWindows:
        """
        Raises:
            ValueError: the settings are no windows.
        """
        return tile_windows(
            num_windows=self.num_time_windows,
            boundaries=self.window_boundaries,
            num_train_timesteps=num_train_timesteps,
        )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(Section):
    """What the teacher solves.

    Attributes:
        steps_per_window: DDIM steps from a window's start to its end.
        cfg_mode: "sync": the teacher has no guidance, and the student keeps the teacher's answer to it; "fixed": the
            teacher's guidance is baked into the student, which is then sampled without.
        guidance_scale: of the teacher under "fixed", at least 1.
        starts: where windows start: "noised" pictures, or the teacher's own "trajectory" from pure noise through all
            windows, which needs prompts only.
        on_policy_share: share of the trajectories that start a window where the student ended the one before.
        on_policy_from: share of the training before that begins.
        buffer_size: trajectories that each process keeps to draw from.
        solve_every: micro-steps for which a batch of trajectories is used before the next one is solved. By default
            as many as there are windows, so that each pair is used once on average.
        dtype: of the teacher and of the encoders. A VAE that needs float32 keeps it.
        offload: what waits in the host's memory while it is not used: "none", the "encoders", or "all" with the
            teacher's UNet.
        text_cache: prompts whose embeddings are kept on the device (about 0.3 MB each for SDXL in half precision).
        latent_cache: pictures whose latents are kept, recognised by their pixels.
    """

    steps_per_window: int = 10
    cfg_mode: Literal["sync", "fixed"] = "sync"
    guidance_scale: float = 7.5
    starts: Literal["noised", "trajectory"] = "noised"
    on_policy_share: float = 0.0
    on_policy_from: float = 0.33
    buffer_size: int = 256
    solve_every: int | None = None
    dtype: DTypeName = "float32"
    offload: Literal["none", "encoders", "all"] = "none"
    text_cache: int = 1024
    latent_cache: int = 0

    def problems(self) -> Iterator[str]:
        whole = {"steps_per_window": self.steps_per_window, "solve_every": self.solve_every}
        yield from at_least(1, **{f"teacher.{name}": value for name, value in whole.items()})
        yield from at_least(1, **{"teacher.buffer_size": self.buffer_size})
        caches = {"teacher.text_cache": self.text_cache, "teacher.latent_cache": self.latent_cache}
        yield from at_least(0, **caches)
        yield from share(
            **{"teacher.on_policy_share": self.on_policy_share, "teacher.on_policy_from": self.on_policy_from}
        )
        if not 1 <= self.guidance_scale < float("inf"):
            yield f"teacher.guidance_scale={self.guidance_scale} is below 1 or not finite; pass 1 for no guidance."
        if self.on_policy_share > 0 and self.starts == "noised":
            yield "teacher.on_policy_share needs trajectories; pass teacher.starts=trajectory, or a share of 0."


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """The student's loss.

    Attributes:
        kind: "l2", or "huber", which is quadratic up to `huber_c` and linear beyond.
        huber_c: see there; above 0.
        weighting: of each row: "none"; "reciprocal", 1 / (1 - t) with t held back from 1 and a mean of 1 over all t;
            "endpoint", which turns an error of the output into an error of the picture at the window's end; "window",
            the weight of its window.
        window_weights: one for each window, noisiest first, for "window".
        max_weight: the most that "endpoint" weighs.
        caption_dropout: share of the prompts that teacher and student see as the empty one.
    """

    kind: Literal["l2", "huber"] = "l2"
    huber_c: float = 0.1
    weighting: Literal["none", "reciprocal", "endpoint", "window"] = "none"
    window_weights: tuple[float, ...] | None = None
    max_weight: float = 10.0
    caption_dropout: float = 0.1

    def problems(self) -> Iterator[str]:
        yield from positive(**{"loss.huber_c": self.huber_c, "loss.max_weight": self.max_weight})
        yield from share(**{"loss.caption_dropout": self.caption_dropout})
        weights = {f"loss.window_weights[{i}]": weight for i, weight in enumerate(self.window_weights or ())}
        yield from not_negative(**weights)
        if weights and not any(weights.values()):
            yield f"loss.window_weights={list(weights.values())} train nothing; pass at least one above 0."
        if (self.weighting == "window") != (self.window_weights is not None):
            yield (
                f"loss.weighting={self.weighting!r} and loss.window_weights={self.window_weights} do not go together; "
                "pass weights with weighting='window', and only then."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """How the student is updated, on each of the processes.

    Attributes:
        name: "adamw", or "adamw8bit" of bitsandbytes.
        schedule: diffusers' name of the learning rate's course.
        max_steps: updates in all.
        batch_size: rows of a micro-step, of each process.
        gradient_accumulation_steps: micro-steps of an update.
        gradient_checkpointing: computes activations twice instead of keeping them.
        ema_decay: of the averaged weights that are the result; 0 for none.
        mixed_precision: "no", "fp16" or "bf16"; None as accelerate is configured.
        channels_last: memory format of the UNets.
        compile: both UNets with torch.compile.
        seed: of all random numbers, from 0 to below 2**64.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    schedule: Schedule = "constant_with_warmup"
    warmup_steps: int = 100
    max_steps: int = 10_000
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    channels_last: bool = False
    compile: bool = False
    seed: int = 0

    def problems(self) -> Iterator[str]:
        yield from positive(
            **{"optimizer.learning_rate": self.learning_rate, "optimizer.max_grad_norm": self.max_grad_norm}
        )
        yield from not_negative(**{"optimizer.weight_decay": self.weight_decay})
        yield from share_below_one(
            **{"optimizer.betas[0]": self.betas[0], "optimizer.betas[1]": self.betas[1]},
            **{"optimizer.ema_decay": self.ema_decay},
        )
        counts = ("max_steps", "batch_size", "gradient_accumulation_steps")
        yield from at_least(1, **{f"optimizer.{name}": getattr(self, name) for name in counts})
        yield from at_least(0, **{"optimizer.warmup_steps": self.warmup_steps, "optimizer.seed": self.seed})
        if self.seed >= _SEEDS:
            yield f"optimizer.seed={self.seed} is too large for a generator; pass one below 2**64."
        if self.schedule == "polynomial" and 0 < self.learning_rate <= _POLYNOMIAL_END:
            yield (
                f"optimizer.learning_rate={self.learning_rate:g} is not above {_POLYNOMIAL_END:g}, where "
                "optimizer.schedule='polynomial' ends; pass a higher one, or another schedule."
            )


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Section):
    """Where the result, the checkpoints and the figures go.

    Attributes:
        directory: of all of them.
        checkpoint_every: updates between two checkpoints.
        keep_checkpoints: how many of them stay.
        log_every: updates between two readings of the loss; between them nothing is read back from the device.
        tracker: "tensorboard" or "wandb", by accelerate.
        resume: "latest" checkpoint in the directory (from the beginning where there is none), or the path of one. Of
            later steps in the directory nothing stays once this run has saved a checkpoint of its own.
        num_inference_steps: that the recipe recommends; by default one a window.
        delta_dtype: in which the delta and its LoRA forms are stored, and weights that go into the workflow.
        validation_every: updates between two validations, each a sheet of pictures (teacher beside student) and the
            windows' straightness; there is one before the first update too, and one after the last. None for none.
        validation_prompts: what the sheets show.
        validation_steps: of the student; by default about 1, 1.5 and 2 for each window.
        validation_teacher_steps: of the teacher.
        workflow: write a workflow repository at the end (SDXL). One with a teacher from the Hub refers to it; any
            other holds the teacher's weights.
        evaluation_prompts: prompts of the report's table of quality, for the demo's pictures; 0 for no table.
    """

    paths = ("directory", "resume")

    directory: str
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_every: int = 10
    tracker: Literal["tensorboard", "wandb"] | None = None
    resume: str | None = None
    num_inference_steps: int | None = None
    delta_dtype: DTypeName = "float16"
    validation_every: int | None = None
    validation_prompts: tuple[str, ...] = ()
    validation_steps: tuple[int, ...] | None = None
    validation_teacher_steps: int = 50
    workflow: bool = True
    evaluation_prompts: int = 0

    def problems(self) -> Iterator[str]:
        if not self.directory.strip():
            yield "output.directory is empty; name a directory."
        counts = ("checkpoint_every", "keep_checkpoints", "log_every", "num_inference_steps", "validation_every")
        yield from at_least(1, **{f"output.{name}": getattr(self, name) for name in counts})
        yield from at_least(1, **{"output.validation_teacher_steps": self.validation_teacher_steps})
        if self.evaluation_prompts != 0:
            yield from at_least(2, **{"output.evaluation_prompts": self.evaluation_prompts})
        if self.validation_every is not None and not self.validation_prompts:
            yield "output.validation_every needs output.validation_prompts; pass a few prompts, or leave it out."
        if self.validation_steps == ():
            yield "output.validation_steps is empty; name numbers of steps, or leave it out."


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    """A whole distillation; `problems` are those between sections."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    windows: WindowConfig = WindowConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def problems(self) -> Iterator[str]:
        yield from cross_problems(vars(self))


def cross_problems(sections: Mapping[str, object]) -> Iterator[str]:
    """Rules between sections, as far as the sections are there: a broken one is told by itself."""
    windows, loss, output = sections.get("windows"), sections.get("loss"), sections.get("output")
    if isinstance(windows, WindowConfig):
        count = windows.tile().num_windows
        if isinstance(loss, LossConfig) and loss.window_weights and len(loss.window_weights) != count:
            yield f"loss.window_weights has {len(loss.window_weights)} weights for {count} windows; pass {count}."
        if isinstance(output, OutputConfig) and output.num_inference_steps is not None:
            yield from at_least(count, **{"output.num_inference_steps": output.num_inference_steps})
        if isinstance(output, OutputConfig):
            steps = enumerate(output.validation_steps or ())
            yield from at_least(count, **{f"output.validation_steps[{i}]": number for i, number in steps})
        teacher = sections.get("teacher")
        if isinstance(teacher, TeacherConfig):
            yield from _solver_problems(windows.tile(), teacher.steps_per_window)
    teacher, data = sections.get("teacher"), sections.get("data")
    if isinstance(data, DataConfig):
        yield from value_problems(data)
        if isinstance(output, OutputConfig) and output.evaluation_prompts and not _of_the_demo(sections):
            yield (
                f"output.evaluation_prompts is for data.kind='demo' at data.resolution={DEMO_PICTURE_SIZE} and a "
                "teacher in a directory; leave it out."
            )
    if isinstance(teacher, TeacherConfig) and isinstance(data, DataConfig):
        if teacher.starts == "noised" and data.kind == "prompts":
            yield "data.kind='prompts' has no pictures to noise; pass teacher.starts=trajectory, or pictures."


def _of_the_demo(sections: Mapping[str, object]) -> bool:
    """Whether the judge of the demo's pictures can judge those of this training."""
    model, data = sections.get("model"), sections.get("data")
    local = not isinstance(model, ModelConfig) or model.teacher == "demo" or Path(model.teacher).is_dir()
    return isinstance(data, DataConfig) and data.kind == "demo" and data.resolution == DEMO_PICTURE_SIZE and local


def _solver_problems(windows: TimeWindows, steps: int) -> Iterator[str]:
    narrowest = min(start - end for start, end in zip(windows.starts, windows.ends, strict=True))
    timesteps = round(narrowest * windows.num_train_timesteps)
    if steps > timesteps:
        yield f"teacher.steps_per_window={steps} exceeds a window's {timesteps} timesteps; pass at most {timesteps}."
