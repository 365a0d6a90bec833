"""The settings of a distillation: pydantic models, read from TOML, YAML or JSON files and `--section.field` overrides.

A rule about one value is a constraint of its field. A rule about several values of a section is in the section's
`rules`, one about several sections in those of `DistillConfig`, which is checked once all sections are sound.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ..core.parameterization import PredictionType
from ..core.windows import TimeWindows, tile_windows

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
DTypeName = Literal["float32", "float16", "bfloat16"]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
DEMO_IMAGE_SIZE = 64


class ConfigError(ValueError):
    """Settings that cannot be used; `problems` holds one line for each mistake."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        listed = [f"{len(self.problems)} settings are wrong:", *(f"- {problem}" for problem in self.problems)]
        super().__init__(self.problems[0] if len(self.problems) == 1 else "\n".join(listed))


class Section(BaseModel):
    """A frozen part of the settings that knows no other keys than its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    def rules(self) -> Iterator[str]:
        """A sentence for each broken rule about values that are sound one by one."""
        yield from ()

    @model_validator(mode="after")
    def _check_rules(self) -> Section:
        if broken := list(self.rules()):
            raise ValueError("\n".join(broken))
        return self


class ModelConfig(Section):
    """Teacher and student."""

    teacher: PathText
    """Repository or directory of a Stable Diffusion pipeline, or of an unconditional one such as DDPMPipeline's, or
    "demo" for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    variant: str | None = None
    """Variant of the weight files, such as "fp16"."""
    student: Literal["full", "lora"] = "full"
    """"full" trains all weights, "lora" low-rank factors beside them."""
    lora_rank: PositiveInt = 64
    """Rank of the factors; they are applied with factor 1."""
    lora_targets: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Ends of the names of layers that get factors; by default all linear layers and convolutions of the blocks."""
    frozen: tuple[str, ...] = ()
    """Patterns such as "*transformer_blocks*" of a full student's weights that are not trained, nor in the delta."""

    def rules(self) -> Iterator[str]:
        if self.student == "lora" and self.frozen:
            yield "model.frozen: for full weights; name the layers that get factors in model.lora_targets instead."


class DataConfig(Section):
    """A dataset and how its images are cropped."""

    kind: Literal["datasets", "folder", "webdataset", "prompts", "demo"] = "prompts"
    """"datasets": a Hugging Face dataset. "folder": images with captions in metadata.jsonl, .csv or .parquet, or in
    .txt files beside them. "webdataset": tar shards. "prompts": captions without images. "demo": the demo's images."""
    path: PathText | None = None
    """Hub id, directory or file; for webdataset a tar file or URL too, or a range such as "s-{000..099}.tar"."""
    subset: str | None = None
    """Configuration of a dataset on the Hub that has several."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the Hub."""
    split: Text = "train"
    """Split of a dataset, with a slice such as "train[:1000]" unless it is streamed."""
    streaming: bool = False
    """Reads a dataset while training instead of downloading it first."""
    image_column: Text | None = None
    """Column (webdataset: extension) of images, or paths from `path`; by default the first of images, or "image"."""
    caption_column: Text | None = None
    """Column (webdataset: extension, .json's key) of captions, a text or a list; else text, caption, prompt or txt."""
    captions: bool = True
    """Whether images need captions. False for a model without prompts; "prompts" are then empty and need no path."""
    trigger: str = ""
    """Words put before every caption, with a comma between."""
    resolution: Annotated[int, Field(ge=8, le=16384)] = 1024
    """Side in pixels of a square image; buckets have about its area."""
    bucketing: bool = True
    """Keeps about the aspect ratio of images; otherwise all are cropped to squares."""
    bucket_step: Annotated[int, Field(ge=8)] = 64
    """Heights and widths of buckets are multiples of this many pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Longest side over shortest side of a bucket, at most. Images beyond are cropped to it."""
    max_enlargement: Annotated[float, Field(ge=1)] = 1.5
    """An image that has to grow by more than this factor to cover its bucket is left out as too small."""
    center_crop: bool = False
    """Crops the middle of an image instead of a random place."""
    random_flip: bool = False
    """Mirrors half of the images."""
    max_samples: PositiveInt | None = None
    """Only the first so many; for the demo how many images are drawn (10,000 by default)."""
    shuffle_buffer: PositiveInt = 1000
    """Samples held in memory to shuffle a stream (webdataset, streaming)."""
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0
    """Processes that read images, for each training process. Batches do not depend on it."""

    def rules(self) -> Iterator[str]:
        if self.path is None and self.kind != "demo" and (self.captions or self.kind != "prompts"):
            yield f"data.path: missing for data.kind={self.kind}; say where the data is."
        if self.streaming and self.kind != "datasets":
            yield f"data.streaming: goes with data.kind=datasets, not {self.kind}; leave it out."
        multiple = self.bucket_step if self.bucketing and self.kind != "prompts" else 8
        if self.resolution % multiple:
            below = max(multiple, self.resolution // multiple * multiple)
            yield f"data.resolution: must be a multiple of {multiple} (given {self.resolution}); pass {below}."
        if self.kind == "demo" and self.resolution > DEMO_IMAGE_SIZE * self.max_enlargement:
            yield f"data.resolution: {self.resolution} is too large for the demo's images; pass {DEMO_IMAGE_SIZE}."


class WindowConfig(Section):
    """The student's windows and the times at which it is trained."""

    num_time_windows: PositiveInt = 4
    """Number of equal windows."""
    window_boundaries: tuple[float, ...] | None = None
    """Descending times from 1 to 0 for unequal windows; they decide the number."""
    prediction_type: PredictionType = "ddim_eps"
    """What the student predicts: "ddim_eps" (SDXL), "diff_eps" (SD 1.5) or "velocity" (SD 2.1)."""
    times: Literal["continuous", "discrete"] = "continuous"
    """"continuous", or "discrete" for `num_discrete_times` equidistant ones."""
    num_discrete_times: PositiveInt = 200
    """Number of discrete times over all windows."""
    start_share: ShareBelowOne = 0.0
    """Share in [0, 1) of the times that lie at their window's start; the others are drawn evenly."""
    zero_snr_start: bool = False
    """Noised starts at t = 1 are pure noise, without the trace of the image that the noise schedule leaves there."""

    def rules(self) -> Iterator[str]:
        try:
            if self.num_discrete_times < (count := self.tile().num_windows):
                yield f"windows.num_discrete_times: {self.num_discrete_times} is below the {count} windows."
        except ValueError as error:
            yield f"windows: {error}"

    def tile(self, num_train_timesteps: int = 1000) -> TimeWindows:
        """The windows of a noise schedule with that many timesteps."""
        count, boundaries = self.num_time_windows, self.window_boundaries
        return tile_windows(num_windows=count, boundaries=boundaries, num_train_timesteps=num_train_timesteps)


class TeacherConfig(Section):
    """What the teacher solves."""

    order: Annotated[int, Field(ge=1, le=2)] = 2
    """Order of the solver: 2 reuses the prediction of the step before, so that 5 steps do what 10 do in the published
    order 1, which is DDIM."""
    steps_per_window: PositiveInt = 5
    """Steps from a window's start to its end, each with one call of the teacher; published are 10 of order 1."""
    cfg_mode: Literal["sync", "fixed"] = "sync"
    """"sync": no guidance here, the student is sampled with it. "fixed": the teacher's guidance is baked in."""
    guidance_scale: Annotated[float, Field(ge=1)] = 7.5
    """Guidance of the teacher under "fixed"; 1 is none."""
    starts: Literal["noised", "trajectory"] = "noised"
    """Where windows start: at "noised" images, or on the teacher's own "trajectory", which needs prompts only."""
    on_policy_share: Share = 0.0
    """Share of the trajectories that start a window where the student ended the one before."""
    on_policy_from: Share = 0.33
    """Share of the training before that begins."""
    buffer_size: PositiveInt = 256
    """Trajectories that each process keeps to draw from."""
    solve_every: PositiveInt | None = None
    """Micro-steps between two batches of trajectories; by default one a window, so that a pair is used once or so."""
    dtype: DTypeName = "float32"
    """Type of the teacher and of the encoders. A VAE that needs float32 keeps it."""
    offload: Literal["none", "encoders", "all"] = "none"
    """What waits in host memory while it is not used: "none", the "encoders", or "all" with the teacher's UNet."""
    text_cache: NonNegativeInt = 1024
    """Prompts whose embeddings are kept on the device (about 0.3 MB each for SDXL in half precision)."""

    def rules(self) -> Iterator[str]:
        if self.on_policy_share > 0 and self.starts == "noised":
            yield "teacher.on_policy_share: needs trajectories; pass teacher.starts=trajectory, or a share of 0."


class LossConfig(Section):
    """The student's loss."""

    kind: Literal["l2", "huber"] = "l2"
    """"l2", or "huber", which is quadratic up to `huber_c` and linear beyond."""
    huber_c: PositiveFloat = 0.1
    """See `kind`."""
    weighting: Literal["none", "reciprocal", "endpoint"] = "none"
    """Of each row: "none"; "reciprocal", 1 / (1 - t), of mean 1; "endpoint", the error is that of the window's end."""
    max_weight: PositiveFloat = 10.0
    """The most that "endpoint" weighs."""
    caption_dropout: Share = 0.1
    """Share of the prompts that teacher and student see as the empty one."""


class OptimizerConfig(Section):
    """How the student is updated, on each of the processes."""

    name: Literal["adamw", "adamw8bit"] = "adamw"
    """"adamw", or "adamw8bit" of bitsandbytes."""
    learning_rate: PositiveFloat = 5e-5
    """Learning rate at the schedule's height."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    """Decay of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 1e-2
    """Decoupled weight decay of AdamW."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    schedule: Schedule = "constant_with_warmup"
    """Course of the learning rate, by diffusers' names."""
    warmup_steps: NonNegativeInt = 100
    """Updates in which the learning rate rises from 0."""
    max_steps: PositiveInt = 10_000
    """Updates in all."""
    batch_size: PositiveInt = 1
    """Rows of a micro-step, of each process."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-steps of an update."""
    gradient_checkpointing: bool = False
    """Computes activations twice instead of keeping them."""
    ema_decay: ShareBelowOne = 0.999
    """Decay of the averaged weights that are the result; 0 for none."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """By default as accelerate is configured."""
    channels_last: bool = False
    """Memory format of the UNets."""
    compile: bool = False
    """Compiles both UNets."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of all random numbers."""


class OutputConfig(Section):
    """Where the result, the checkpoints and the figures go."""

    directory: PathText
    """Directory of all of them."""
    checkpoint_every: PositiveInt = 500
    """Updates between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """How many checkpoints stay."""
    log_every: PositiveInt = 10
    """Updates between two readings of the loss; between them nothing is read back from the device."""
    tracker: Literal["tensorboard", "wandb"] | None = None
    """Tracker that the curves go to."""
    resume: PathText | None = None
    """"latest" checkpoint in the directory, if any, or the path of one; later ones go when this run saves one."""
    num_inference_steps: PositiveInt | None = None
    """Number of steps that the recipe recommends; by default one for each window."""
    delta_dtype: DTypeName = "float16"
    """Type in which the delta, its LoRA forms and the workflow's weights are stored."""
    validation_every: PositiveInt | None = None
    """Updates between two validations: a sheet of images and endpoint errors. The first comes before any update."""
    validation_prompts: tuple[str, ...] = ()
    """Prompts of the sheets."""
    validation_steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """Numbers of steps of the student; by default about 1, 1.5 and 2 for each window."""
    validation_teacher_steps: PositiveInt = 50
    """Number of steps of the teacher."""
    workflow: bool = True
    """Writes a workflow repository at the end. It refers to a teacher on the Hub and holds any other."""

    def rules(self) -> Iterator[str]:
        if self.validation_every is not None and not self.validation_prompts:
            yield "output.validation_every: needs output.validation_prompts; pass a few prompts, or leave it out."


class DistillConfig(Section):
    """A whole distillation."""

    model: ModelConfig
    data: DataConfig
    output: OutputConfig
    windows: WindowConfig = WindowConfig()
    teacher: TeacherConfig = TeacherConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def flat(self) -> dict[str, Any]:
        """The settings by "section.field", as values that JSON has."""
        tree = self.model_dump(mode="json")
        return {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}

    def rules(self) -> Iterator[str]:
        windows, output = self.windows.tile(), self.output
        count = windows.num_windows
        if output.num_inference_steps is not None and output.num_inference_steps < count:
            yield f"output.num_inference_steps: {output.num_inference_steps} is below the {count} windows."
        narrowest = min(start - end for start, end in zip(windows.starts, windows.ends, strict=True))
        timesteps = round(narrowest * windows.num_train_timesteps)
        if self.teacher.steps_per_window > timesteps:
            yield f"teacher.steps_per_window: must be at most {timesteps}, the timesteps of the narrowest window."
        if self.teacher.starts == "noised" and self.data.kind == "prompts":
            yield "data.kind: prompts have no images to noise; pass teacher.starts=trajectory, or images."


def load_config(path: str | os.PathLike[str], overrides: Mapping[str, str] | None = None) -> DistillConfig:
    """The settings of a .toml, .yaml, .yml or .json file with a table for each section of `DistillConfig`.

    `overrides` has by "section.field" the text of a value that replaces the file's: "0.5", "true", "a prompt", "null"
    for None, "[1, 0.4, 0]" for a list. Raises ConfigError: the file cannot be read, or all that is wrong with it.
    """
    tree, problems = _read(Path(path).expanduser()), []
    for key, text in (overrides or {}).items():
        section, _, name = key.partition(".")
        if not name or not isinstance(tree.setdefault(section, {}), dict):
            problems.append(f"--{key}: not a setting; write --section.field VALUE.")
        else:
            tree[section][name] = _parse(text)
    try:
        config = DistillConfig.model_validate(tree)
    except ValidationError as error:
        problems += _lines(error)
    if problems:
        raise ConfigError(problems)
    return config


def _read(path: Path) -> dict[str, Any]:
    parsers: dict[str, Any] = {".toml": tomllib.loads, ".json": json.loads, ".yaml": _load_yaml, ".yml": _load_yaml}
    if path.suffix not in parsers:
        raise ConfigError([f"{path} is not a {', '.join(parsers)} file; name one."])
    if not path.is_file():
        raise ConfigError([f"{path} is not a file; name a file of settings."])
    try:
        tree = parsers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"{path} cannot be read as {path.suffix[1:]} ({' '.join(str(error).split())})."]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path} has no sections; write tables such as [model] and [output]."])
    return tree


def _load_yaml(text: str) -> Any:
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):  # a few lines of them grow without bound
        raise ValueError("aliases such as *name are not supported")
    return yaml.safe_load(text)


def _parse(text: str) -> Any:
    """The value of an override; pydantic reads numbers and booleans from text by itself."""
    if text.startswith("["):
        with suppress(ValueError, RecursionError, yaml.YAMLError):
            return _load_yaml(text)
    return None if text == "null" else text


def _lines(error: ValidationError) -> Iterator[str]:
    """One line for each mistake: "section.field: what is wrong (given the value)"."""
    for detail in error.errors(include_url=False):
        key = ".".join(map(str, detail["loc"]))
        match detail["type"]:
            case "missing":
                yield f"{key}: missing; set it."
            case "extra_forbidden":
                *section, name = map(str, detail["loc"])
                known: Any = DistillConfig.model_fields[section[0]].annotation if section else DistillConfig
                close = get_close_matches(name, known.model_fields, n=1)
                yield f"{key}: unknown; " + (f"did you mean {close[0]}?" if close else "leave it out.")
            case "model_type":
                yield f"{key}: must be a table of settings."
            case "value_error":  # of `rules`, which name their keys
                yield from str(detail["ctx"]["error"]).split("\n")
            case _:
                given = " ".join(str(detail["input"]).split())[:80]
                message = detail["msg"].replace("tuple", "list")
                yield f"{key}: {message[0].lower()}{message[1:]} (given {given})."
