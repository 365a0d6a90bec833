"""Everything that a distillation works with, put together and ready for the first step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, cpu_offload_with_hook
from accelerate.utils import InitProcessGroupKwargs

from .config import DistillConfig
from .data.opening import open_dataset
from .pairs import NoisedStarts, PairSource, TrajectoryStarts
from .step import WindowGeometry
from .student import build_student, make_ema, make_optimizer, make_schedule, trainable
from .teacher import LatentEncoder, Offload, PromptEncoder, Teacher, then, without_factors
from .teacher_source import open_teacher

_PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which alone draws validation sheets and writes the result."""


class Session:
    """A distillation in this process, with nothing taken up from a checkpoint yet.

    Attributes:
        student: the UNet, prepared by the accelerator, as are `optimizer` and `schedule`.
        trained: the student's trainable parameters by their names in the bare UNet.
        ema: averages of `trained`, or None.
        data: batches of this process.
        pairs: what the student is trained on.

    Raises:
        ValueError: weights or data that cannot be read, or averages where each process holds a part of the weights.
    """

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.accelerator = accelerator = make_accelerator(config)
        if config.optimizer.ema_decay and self.is_sharded:
            raise ValueError("optimizer.ema_decay needs all weights in every process, and here each has a part; pass 0.")
        self.source = open_teacher(config.model)
        self.geometry = WindowGeometry(config.windows, self.source.scheduler_config, accelerator.device)
        self.data = open_dataset(
            config.data,
            batch_size=config.optimizer.batch_size,
            seed=config.optimizer.seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        # A LoRA's frozen weights have the type in which they are multiplied anyway.
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self._base_dtype = half.get(accelerator.mixed_precision, torch.float32)
        student = build_student(self.source, config.model, config.optimizer, self._base_dtype)
        optimizer = make_optimizer(trainable(student).values(), config.optimizer)
        schedule = make_schedule(optimizer, config.optimizer)
        prepared: Any = accelerator.prepare(student, optimizer, schedule)
        self.student, self.optimizer, self.schedule = prepared
        self.trained = trainable(accelerator.unwrap_model(self.student))
        self.ema = make_ema(self.trained, config.optimizer.ema_decay)
        self.teacher = self._make_teacher()
        self.pairs = self._make_pairs()

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the student's weights only."""
        plugin = self.accelerator.state.deepspeed_plugin
        fsdp = self.accelerator.distributed_type == DistributedType.FSDP
        return fsdp or (plugin is not None and plugin.zero_stage == 3)

    def _make_teacher(self) -> Teacher:
        config, device, dtype = self.config, self.accelerator.device, getattr(torch, self.config.teacher.dtype)
        text = self.source.load_text_pipeline(dtype)
        encoders = [getattr(text, name) for name in self.source.family.text_encoders]
        offload = _place(encoders, device, config.teacher.offload != "none")
        encoder = PromptEncoder(text, device, config.teacher.text_cache, offload)
        at_hand: Callable[[], AbstractContextManager[None]] = nullcontext
        # The frozen weights of a LoRA serve as the teacher's where they are whole and of its type. With compiled
        # blocks that would compile anew whenever the factors come and go.
        alike = config.model.student == "lora" and dtype == self._base_dtype and not self.is_sharded
        if alike and not config.optimizer.compile:
            unet = self.accelerator.unwrap_model(self.student)
            at_hand = partial(without_factors, unet)
        else:
            unet = self.source.load_unet(dtype).requires_grad_(False)
            if config.optimizer.channels_last:
                unet.to(memory_format=torch.channels_last)
            if config.optimizer.compile:
                unet.compile_repeated_blocks()
            if take_back := _place([unet], device, config.teacher.offload == "all"):
                at_hand = partial(then, take_back)
        return Teacher(unet, self.source.scheduler(), encoder, self.geometry, config.teacher, at_hand)

    def _make_pairs(self) -> PairSource:
        config, device = self.config, self.accelerator.device
        common: dict[str, Any] = {
            "teacher": self.teacher,
            "batches": (batch for batch in self.data),  # from the position that the data has at the first one
            "seed": config.optimizer.seed,
            "process_index": self.accelerator.process_index,
            "caption_dropout": config.loss.caption_dropout,
        }
        if config.teacher.starts == "trajectory":
            factor, rows = self.source.vae_factor, config.optimizer.batch_size
            return TrajectoryStarts(**common, vae_factor=factor, device=device, batch_size=rows)
        vae = self.source.load_vae(getattr(torch, config.teacher.dtype))
        offload = _place([vae], device, config.teacher.offload != "none")
        return NoisedStarts(**common, latents=LatentEncoder(vae, device, config.teacher.latent_cache, offload))


def make_accelerator(config: DistillConfig) -> Accelerator:
    """accelerate's own settings decide devices and processes, and the precision where the configuration does not."""
    accelerator = Accelerator(
        mixed_precision=config.optimizer.mixed_precision,
        gradient_accumulation_steps=config.optimizer.gradient_accumulation_steps,
        log_with=config.output.tracker,
        project_dir=config.output.directory,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:  # it reads this off a prepared data loader otherwise, which there is none of
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.optimizer.batch_size
    return accelerator


def _place(models: list[Any], device: torch.device, offload: bool) -> Offload | None:
    """Puts models on the device, or has them wait on the host; then returns what takes them back there."""
    if offload:
        hooks = [cpu_offload_with_hook(model, device)[1] for model in models]
        return lambda: [hook.offload() for hook in hooks]
    for model in models:
        model.to(device)
    return None
