"""Where the teacher comes from: a repository, a directory or a single file, looked at before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import SafetensorError, safe_open
from transformers import CLIPTokenizer

from .config import ModelConfig
from .families import SDXL, ModelFamily, family_of

_DEMO = "demo"


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """A teacher whose configurations were read and whose weights were not.

    Attributes:
        label: its name for the recipe: the repository, or the last part of a path.
        location: repository or directory of the parts; for a single file of their configurations.
        single_file: the checkpoint, if it is one.
        family: its family.
        unet_config: configuration of the UNet.
        scheduler_config: configuration of the scheduler.
        vae_config: configuration of the autoencoder.
    """

    label: str
    location: str
    single_file: str | None
    revision: str | None
    variant: str | None
    family: ModelFamily
    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]

    @property
    def on_hub(self) -> bool:
        """Whether its parts are in a repository of the Hub, which others can read too."""
        return self.single_file is None and not Path(self.location).exists()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    def scheduler(self) -> DDIMScheduler:
        """The noise schedule as DDIM's, ending at the abar that the windows end at."""
        return DDIMScheduler.from_config(FrozenDict(self.scheduler_config), set_alpha_to_one=False)

    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """A new copy of the teacher's UNet on the CPU, in evaluation mode."""
        if self.single_file is not None:
            unet = UNet2DConditionModel.from_single_file(
                self.single_file, config=self.location, subfolder="unet", dtype=dtype
            )
        else:
            unet = UNet2DConditionModel.from_pretrained(self.location, subfolder="unet", dtype=dtype, **self._where)
        return unet.eval()

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder on the CPU; one that overflows in half precision comes in float32."""
        if self.vae_config.get("force_upcast", True):
            dtype = torch.float32
        if self.single_file is not None:
            vae = AutoencoderKL.from_single_file(self.single_file, config=self.location, subfolder="vae", dtype=dtype)
        else:
            vae = AutoencoderKL.from_pretrained(self.location, subfolder="vae", dtype=dtype, **self._where)
        return vae.eval().requires_grad_(False)

    def load_text_pipeline(self, dtype: torch.dtype) -> Any:
        """The family's pipeline with text encoders and tokenizers alone, on the CPU."""
        tokenizers = {
            name: CLIPTokenizer.from_pretrained(self.location, subfolder=name, revision=self.revision)
            for name in self.family.tokenizers
        }
        absent = {"unet": None, "vae": None}
        if self.family is not SDXL:
            absent |= {"safety_checker": None, "feature_extractor": None}
        if self.single_file is not None:
            pipeline = self.family.pipeline.from_single_file(
                self.single_file, config=self.location, dtype=dtype, **tokenizers, **absent
            )
            encoders = {name: getattr(pipeline, name) for name in self.family.text_encoders}
        else:
            encoders = {
                name: kind.from_pretrained(self.location, subfolder=name, dtype=dtype, **self._where)
                for name, kind in self.family.text_encoders.items()
            }
        for encoder in encoders.values():
            encoder.eval().requires_grad_(False)
        return self.family.pipeline(
            **encoders, **tokenizers, **absent, scheduler=self.scheduler(), **self.pipeline_settings()
        )

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "variant": self.variant}

    def pipeline_settings(self) -> dict[str, Any]:
        """What the family's pipeline is made with beside its parts."""
        if self.family is not SDXL:
            return {"requires_safety_checker": False}
        zeros = _index(self.location, self.revision).get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}


def open_teacher(model: ModelConfig) -> TeacherSource:
    """Reads the configurations of the teacher's parts, from the Hub where it is there.

    Raises:
        ValueError: nothing is there, a part is missing, or the model is of no family that can be distilled.
    """
    label, location, single_file = model.teacher, model.teacher, None
    path = Path(model.teacher)
    if model.teacher == _DEMO:
        from ..demo import weights_directory

        location = str(weights_directory())
    elif path.is_dir():
        label, location = path.resolve().name, str(path)
    elif path.suffix in (".safetensors", ".ckpt"):
        label, single_file = path.stem, str(path)
        location = _config_location(single_file, model.config)
    elif path.is_absolute() or model.teacher.startswith((".", "~")) or model.teacher.count("/") != 1:
        raise ValueError(f"model.teacher={model.teacher} does not exist; pass a directory, or owner/name.")
    unet_config, scheduler_config, vae_config = (
        _part_config(location, folder, model.revision) for folder in ("unet", "scheduler", "vae")
    )
    return TeacherSource(
        label=label,
        location=location,
        single_file=single_file,
        revision=model.revision,
        variant=model.variant,
        family=family_of(unet_config),
        unet_config=unet_config,
        scheduler_config=scheduler_config,
        vae_config=vae_config,
    )


def _config_location(file: str, config: str | None) -> str:
    """Where the configurations of a single file are: `config`, or what diffusers infers from the file's header."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: torch.empty(opened.get_slice(name).get_shape(), device="meta") for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        fault = "is not a complete .safetensors file" if Path(file).exists() else "does not exist"
        raise ValueError(f"model.teacher={file} {fault} ({error}); pass another one.") from error
    return config or str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def _part_config(location: str, folder: str, revision: str | None) -> dict[str, Any]:
    loader: Any = DDIMScheduler if folder == "scheduler" else UNet2DConditionModel
    try:
        return dict(loader.load_config(location, subfolder=folder, revision=revision))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.teacher: cannot read the {folder}'s configuration in {location} ({reason}); pass a pipeline with "
            "a folder for each part."
        ) from error


def _index(location: str, revision: str | None) -> dict[str, Any]:
    """The pipeline's own settings; empty where it has none."""
    names = (DiffusionPipeline.config_name, "modular_model_index.json")
    for file in (Path(location) / name for name in names):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    if Path(location).is_dir():
        return {}
    loader: type[ConfigMixin] = DiffusionPipeline
    return dict(loader.load_config(location, revision=revision))
