"""Small data sets for the tests of the trainer's data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from perflow_blocks.core.noise_schedule import make_alphas_cumprod
from perflow_blocks.schedulers.pfode_solver import Conditioning
from perflow_blocks.testing.tiny import BETAS, tiny_sd_components
from perflow_blocks.training.buckets import TrainingBatch
from perflow_blocks.training.config import DataConfig, DistillConfig, TeacherConfig, WindowConfig, load_config
from perflow_blocks.training.data import BatchSource
from perflow_blocks.training.teacher import Teacher, WindowGeometry
from tests.conftest import save_repository


@pytest.fixture(autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps to a temporary folder, and offline."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


SHAPES = [(96, 96), (64, 128), (128, 64), (96, 80), (80, 96), (100, 130)]
"""(height, width) of pictures in turn."""


def picture(number: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A picture of one colour that tells its number."""
    return Image.new("RGB", (size[1], size[0]), (number % 256, number // 256, 128))


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def noise_jpeg(size: tuple[int, int] = (96, 96)) -> bytes:
    """A JPEG file large enough to be cut short in the middle of its data."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def truncated() -> bytes:
    data = noise_jpeg()
    return data[: len(data) // 2]


def make_folder(root: Path, count: int = 24, *, captions: str = "metadata.jsonl") -> Path:
    """Numbered pictures of several shapes, captioned "number 7", in a JSON Lines file or (".txt") beside them."""
    root.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        (root / f"{number:03}.png").write_bytes(encoded(picture(number, SHAPES[number % len(SHAPES)])))
        if captions == ".txt":
            (root / f"{number:03}.txt").write_text(f"number {number}\n")
        lines.append({"file_name": f"{number:03}.png", "text": f"number {number}"})
    if captions != ".txt":
        write_lines(root / captions, lines)
    return root


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_shards(root: Path, *, shards: int = 4, per_shard: int = 6) -> str:
    """webdataset shards of pictures as in `make_folder`; the brace range that names them."""
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        numbers = range(shard * per_shard, (shard + 1) * per_shard)
        write_shard(
            root / f"s-{shard:02}.tar",
            [
                (f"{number:03}.{form}", data)
                for number in numbers
                for form, data in (
                    ("png", encoded(picture(number, SHAPES[number % len(SHAPES)]))),
                    ("txt", f"number {number}".encode()),
                )
            ],
        )
    return str(root / f"s-{{00..{shards - 1:02}}}.tar")


def write_shard(path: Path, files: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def small(kind: str, path: object = None, **changes: object) -> DataConfig:
    """A configuration for the pictures above: resolution 64 in steps of 16."""
    values = {"resolution": 64, "bucket_step": 16, "path": None if path is None else str(path)}
    return DataConfig(kind=kind, **{**values, **changes})  # type: ignore[arg-type]


def take(source: BatchSource, count: int) -> list[TrainingBatch]:
    return list(islice(source, count))


def numbers(batches: Iterable[TrainingBatch]) -> list[int]:
    """The numbers in the captions of the batches."""
    return [int(prompt.split()[-1]) for batch in batches for prompt in batch.prompts]


def assert_same(first: Sequence[TrainingBatch], second: Sequence[TrainingBatch]) -> None:
    """Equal batches in equal order, pixels to the bit."""
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.prompts == other.prompts
        assert one.original_sizes == other.original_sizes
        assert one.crop_tops_lefts == other.crop_tops_lefts
        assert one.target_sizes == other.target_sizes
        if one.pixels is None or other.pixels is None:
            assert one.pixels is other.pixels
        else:
            assert torch.equal(one.pixels, other.pixels)


SCHEDULE: dict[str, Any] = {**BETAS, "num_train_timesteps": 1000}
TINY = """
[model]
teacher = "{teacher}"
[data]
kind = "demo"
resolution = 32
bucket_step = 8
max_samples = 40
[teacher]
steps_per_window = 2
[optimizer]
learning_rate = 1e-3
warmup_steps = 0
max_steps = 6
batch_size = 2
[output]
directory = "{directory}"
log_every = 2
checkpoint_every = 3
"""


def save_teacher(folder: Path, family: str, scheduler: Any = None) -> Path:
    """A tiny pipeline of the family "sdxl" or "sd"."""
    scheduler = scheduler or DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    if family == "sdxl":
        return save_repository(folder, scheduler=scheduler)
    StableDiffusionPipeline(**tiny_sd_components(scheduler)).save_pretrained(folder)
    return folder


def write_config(folder: Path, teacher: Path | str, name: str = "run", text: str = TINY) -> Path:
    """A file of settings whose output goes to `folder/name`."""
    path = folder / f"{name}.toml"
    path.write_text(text.format(teacher=teacher, directory=folder / name))
    return path


def tiny_config(folder: Path, teacher: Path | str, name: str = "run", **overrides: object) -> DistillConfig:
    """The tiny configuration; overrides are named `section__field`."""
    texts = {key.replace("__", ".", 1): str(value) for key, value in overrides.items()}
    return load_config(write_config(folder, teacher, name), texts)


def losses(run: Path) -> list[float]:
    """The loss of every update that a run reported."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["losses"]]


class PlainEncoder:
    """In a `PromptEncoder`'s place: the embedding of a prompt is its number, that of the empty one 0."""

    def conditioning(self, prompts: Sequence[Any], sizes: Any = None, drop: Any = None) -> Conditioning:
        dropped = drop or [False] * len(prompts)
        numbers = [0.0 if out else float(prompt) for prompt, out in zip(prompts, dropped, strict=True)]
        return Conditioning(prompt_embeds=torch.tensor(numbers)[:, None, None])

    def empty(self, like: Conditioning) -> Conditioning:
        return Conditioning(prompt_embeds=torch.zeros_like(like.prompt_embeds))


class PointTeacher:
    """The exact noise prediction for data that is one picture: everywhere `mean` plus the prompt's number.

    DDIM solves its probability flow exactly, in any number of steps.
    """

    def __init__(self, mean: float = 0.5) -> None:
        self.mean = mean
        self.calls: list[tuple[Tensor, Tensor]] = []
        self._alphas = make_alphas_cumprod(**SCHEDULE).float()

    def __call__(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        self.calls.append((timestep, encoder_hidden_states.flatten()))
        x0 = (self.mean + encoder_hidden_states.flatten()[:, None, None, None]).expand_as(sample)
        alpha = self._alphas[timestep.long()][:, None, None, None]
        return ((sample - alpha.sqrt() * x0) / (1.0 - alpha).sqrt(),)


def toy_teacher(
    unet: Any, windows: WindowConfig | None = None, prediction_type: str = "epsilon", **settings: Any
) -> Teacher:
    geometry = WindowGeometry(windows or WindowConfig(), SCHEDULE)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    return Teacher(unet, scheduler, PlainEncoder(), geometry, TeacherConfig(**settings))  # type: ignore[arg-type]
