"""What can be known to be wrong with a distillation before any weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..atomic_files import require_writable_directory
from ..blocks.saving import Problems
from ..hub.export import require_target
from ..schedulers import PFODESolver
from .checkpoints import find_checkpoint
from .config import (
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimizerConfig,
    OutputConfig,
    WindowConfig,
    cross_problems,
)
from .data.config import value_problems
from .data.opening import problems as data_problems
from .families import SDXL
from .geometry import WindowGeometry
from .layout import WORKFLOW, in_the_way
from .optimizers import optimizer_problem
from .rules import ConfigError
from .student import frozen_weights, lora_modules
from .teacher_source import TeacherSource, open_teacher

FAR = 4
"""How many times a teacher's own size is taken for a mistake: a step then takes more than 16 times as long."""


def require_possible(config: DistillConfig) -> None:
    """
    Raises:
        ConfigError: everything that stands in the way of this distillation.
    """
    found = list(preflight(vars(config)))
    if found:
        raise ConfigError(found)


def preflight(sections: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each mistake, as far as the sections are there. Reads no weights and no pictures."""
    problems = Problems()
    model, windows = sections.get("model"), sections.get("windows")
    source: TeacherSource | None = None
    if isinstance(model, ModelConfig):
        with problems.noted():
            source = open_teacher(model)
            _note_teacher(problems, source, windows if isinstance(windows, WindowConfig) else WindowConfig())
            _note_student(problems, source, model)
            _note_size(problems, source, sections)
    data, optimizer, output = sections.get("data"), sections.get("optimizer"), sections.get("output")
    if isinstance(data, DataConfig) and not value_problems(data):
        for sentence in data_problems(data):
            problems.add(sentence)
    if isinstance(optimizer, OptimizerConfig) and (problem := optimizer_problem(optimizer)):
        problems.add(problem)
    if isinstance(output, OutputConfig):
        _note_output(problems, output, sections)
        if output.evaluation_prompts:
            _note_evaluation(problems, source)
        if output.workflow and source is not None and source.family is SDXL:
            with problems.noted(about="output.workflow: "):
                require_target(Path(output.directory) / WORKFLOW, overwrite=True)
    yield from problems


def empty_unet(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The UNet of a configuration, without values."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(dict(config))


def _note_teacher(problems: Problems, source: TeacherSource, windows: WindowConfig) -> None:
    if source.scheduler_config.get("rescale_betas_zero_snr"):
        problems.add(
            "model.teacher: its scheduler has rescale_betas_zero_snr, where a window that starts at noise is "
            "singular; pass a teacher without."
        )
        return
    with problems.noted(about="model.teacher: "):
        PFODESolver(source.scheduler())
    with problems.noted(TypeError, about="model.teacher: "):
        WindowGeometry(windows, source.scheduler_config)


def _note_student(problems: Problems, source: TeacherSource, model: ModelConfig) -> None:
    if model.student == "lora":
        if find_spec("peft") is None:
            problems.add("model.student='lora' needs peft, which is not installed; install it, or pass full.")
        elif model.lora_targets is not None:
            with problems.noted():
                lora_modules(empty_unet(source.unet_config), model.lora_targets)
    if model.frozen:
        with problems.noted():
            frozen_weights(empty_unet(source.unet_config), model.frozen)
    if model.init_student is not None:
        with problems.noted(about=f"model.init_student={model.init_student}: "):
            if not Path(model.init_student).is_dir():
                raise ValueError("there is no such directory; name that of a UNet, student/ of an earlier run say.")
            own = UNet2DConditionModel.load_config(model.init_student)
            shapes = [{n: t.shape for n, t in empty_unet(c).state_dict().items()} for c in (own, source.unet_config)]
            if shapes[0] != shapes[1]:
                raise ValueError("it has another architecture than the teacher; pass a UNet of the same one.")


def _note_size(problems: Problems, source: TeacherSource, sections: Mapping[str, Any]) -> None:
    data = sections.get("data")
    own = source.unet_config.get("sample_size")
    if isinstance(data, DataConfig) and isinstance(own, int) and data.resolution > FAR * own * source.vae_factor:
        problems.add(
            f"data.resolution={data.resolution} is more than {FAR} times the teacher's own {own * source.vae_factor} "
            "pixels; pass one near that."
        )
    if isinstance(data, DataConfig) and data.resolution % source.vae_factor:
        problems.add(
            f"data.resolution={data.resolution} is no multiple of the {source.vae_factor} pixels of a latent; "
            "pass one."
        )


def _note_evaluation(problems: Problems, source: TeacherSource | None) -> None:
    if find_spec("torchmetrics") is None:
        problems.add(
            "output.evaluation_prompts needs torchmetrics, which is not installed; "
            "pip install 'perflow-blocks[eval]', or leave it out."
        )
    if source is not None and source.family is not SDXL:
        problems.add("output.evaluation_prompts is for teachers of SDXL's family; leave it out.")


def _note_output(problems: Problems, output: OutputConfig, sections: Mapping[str, Any]) -> None:
    with problems.noted(about="output.directory: "):
        require_writable_directory(Path(output.directory))
    for sentence in in_the_way(Path(output.directory)):
        problems.add(sentence)
    if output.tracker is not None and find_spec(output.tracker) is None:
        problems.add(f"output.tracker={output.tracker!r} is not installed; install it, or leave it out.")
    complete = all(field.name in sections for field in fields(DistillConfig))
    if complete and not list(cross_problems(sections)):
        with problems.noted():
            find_checkpoint(DistillConfig(**sections))
