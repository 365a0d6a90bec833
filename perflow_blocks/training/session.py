"""Everything that a distillation works with, put together and ready for the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, cpu_offload_with_hook
from accelerate.utils import InitProcessGroupKwargs
from diffusers.training_utils import EMAModel

from .buckets import TrainingBatch
from .checkpoints import save_adapters_alone
from .conditioning import PromptEncoder
from .config import DistillConfig
from .data import BatchSource, open_dataset
from .geometry import WindowGeometry
from .latents import LatentEncoder
from .optimizers import make_optimizer, make_schedule
from .starts import NoisedStarts, PairSource
from .student import build_student, make_ema, trainable
from .teacher import Teacher, then, without_factors
from .teacher_source import TeacherSource, open_teacher
from .trajectories import TrajectoryStarts

TRACKER_NAME = "perflow_distill"
_PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which alone draws validation sheets and writes the result."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A distillation in this process.

    Attributes:
        config: what was asked for.
        accelerator: devices, processes and precision.
        source: the teacher's configurations, for loading its weights again.
        geometry: the windows.
        teacher: solves them.
        student: the UNet, prepared by the accelerator.
        optimizer: prepared likewise.
        schedule: of the learning rate; torch's own is its `scheduler`.
        ema: averages of `trained`, or None.
        data: batches of this process.
        pairs: what the student is trained on.
    """

    config: DistillConfig
    accelerator: Accelerator
    source: TeacherSource
    geometry: WindowGeometry
    teacher: Teacher
    student: Any
    optimizer: Any
    schedule: Any
    ema: EMAModel | None
    data: BatchSource
    pairs: PairSource

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The student's trainable parameters by their names in the bare UNet."""
        return trainable(self.accelerator.unwrap_model(self.student))


def open_session(config: DistillConfig) -> Session:
    """Loads teacher and student, opens the data and prepares all for training; a checkpoint is not taken up yet.

    Raises:
        ValueError: weights or data that cannot be read, or averages where each process holds a part of the weights.
    """
    accelerator = make_accelerator(config)
    source = open_teacher(config.model)
    geometry = WindowGeometry(config.windows, source.scheduler_config, accelerator.device)
    data = open_dataset(
        config.data,
        batch_size=config.optimizer.batch_size,
        seed=config.optimizer.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    student = build_student(source, config.model, config.optimizer, _base_dtype(accelerator))
    optimizer = make_optimizer(trainable(student).values(), config.optimizer)
    schedule = make_schedule(optimizer, config.optimizer)
    student, optimizer, schedule = accelerator.prepare(student, optimizer, schedule)
    teacher = _make_teacher(config, accelerator, source, geometry, student)
    ema = _make_ema(accelerator, student, config.optimizer.ema_decay)
    if config.model.student == "lora":
        save_adapters_alone(accelerator)
    return Session(
        config=config,
        accelerator=accelerator,
        source=source,
        geometry=geometry,
        teacher=teacher,
        student=student,
        optimizer=optimizer,
        schedule=schedule,
        ema=ema,
        data=data,
        pairs=_make_pairs(config, accelerator, source, teacher, _endless(data)),
    )


def make_accelerator(config: DistillConfig) -> Accelerator:
    """accelerate's own settings decide devices and processes, and the precision where the configuration does not."""
    timeout = InitProcessGroupKwargs(timeout=_PATIENCE)
    accelerator = Accelerator(
        mixed_precision=config.optimizer.mixed_precision,
        gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
        log_with=config.output.tracker,
        project_dir=str(Path(config.output.directory)),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[timeout],
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it reads this off a prepared data loader otherwise, which there is none of
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.optimizer.batch_size
    return accelerator


def _base_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of a LoRA student's frozen weights: that in which they are multiplied anyway."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def _make_teacher(
    config: DistillConfig, accelerator: Accelerator, source: TeacherSource, geometry: WindowGeometry, student: Any
) -> Teacher:
    device, dtype = accelerator.device, getattr(torch, config.teacher.dtype)
    text = source.load_text_pipeline(dtype)
    text_encoders = [getattr(text, name) for name in source.family.text_encoders]
    encoder = PromptEncoder(
        text,
        device,
        added_conditions=source.family.added_conditions,
        cache=config.teacher.text_cache,
        offload=_place_all(text_encoders, device, config.teacher.offload != "none"),
    )
    if _is_teacher(config, accelerator):
        unet = accelerator.unwrap_model(student)
        return Teacher(unet, source.scheduler(), encoder, geometry, config.teacher, partial(without_factors, unet))
    unet = source.load_unet(dtype).requires_grad_(False)
    if config.optimizer.channels_last:
        unet.to(memory_format=torch.channels_last)
    if config.optimizer.compile:
        unet.compile()
    take_back = _place(unet, device, config.teacher.offload == "all")
    at_hand: Callable[[], AbstractContextManager[None]] = (
        nullcontext if take_back is None else partial(then, take_back)
    )
    return Teacher(unet, source.scheduler(), encoder, geometry, config.teacher, at_hand)


def _is_teacher(config: DistillConfig, accelerator: Accelerator) -> bool:
    """Whether the student's frozen weights can serve as the teacher's: they are whole and of its type."""
    return (
        config.model.student == "lora"
        and getattr(torch, config.teacher.dtype) == _base_dtype(accelerator)
        and not config.optimizer.compile  # which would compile anew whenever the factors come and go
        and not is_sharded(accelerator)
    )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the student's weights only."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3)


def _place(model: torch.nn.Module, device: torch.device, offload: bool) -> Callable[[], Any] | None:
    """Puts a model on the device, or lets it wait on the host; then returns what takes it back there."""
    if offload:
        _, hook = cpu_offload_with_hook(model, device)
        return hook.offload
    model.to(device)
    return None


def _place_all(models: Iterable[torch.nn.Module], device: torch.device, offload: bool) -> Callable[[], Any] | None:
    """The same for several models, which are taken back together."""
    hooks = [hook for hook in [_place(model, device, offload) for model in models] if hook is not None]
    return (lambda: [hook() for hook in hooks]) if hooks else None


def _make_ema(accelerator: Accelerator, student: Any, decay: float) -> EMAModel | None:
    if decay and is_sharded(accelerator):
        raise ValueError(
            f"optimizer.ema_decay={decay} needs all weights in every process, and here each holds a part; pass 0."
        )
    ema = make_ema(accelerator.unwrap_model(student), decay)
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    return ema


def _make_pairs(
    config: DistillConfig,
    accelerator: Accelerator,
    source: TeacherSource,
    teacher: Teacher,
    batches: Iterator[TrainingBatch],
) -> PairSource:
    seed, index, device = config.optimizer.seed, accelerator.process_index, accelerator.device
    dropout = config.loss.caption_dropout
    if config.teacher.starts == "trajectory":
        return TrajectoryStarts(
            teacher,
            batches,
            vae_factor=source.vae_factor,
            device=device,
            batch_size=config.optimizer.batch_size,
            seed=seed,
            process_index=index,
            caption_dropout=dropout,
        )
    vae = source.load_vae(getattr(torch, config.teacher.dtype))
    offload = _place(vae, device, config.teacher.offload != "none")
    latents = LatentEncoder(vae, device, cache=config.teacher.latent_cache, offload=offload)
    return NoisedStarts(teacher, latents, batches, seed=seed, process_index=index, caption_dropout=dropout)


def _endless(data: BatchSource) -> Iterator[TrainingBatch]:
    """The batches from the position that the data has when the first one is asked for."""
    yield from data
