"""Where the teacher comes from: a repository, a directory or a single file, looked at before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import FrozenDict
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..builder.single_file import config_location, read_shapes
from .config import ModelConfig

LATENT_CHANNELS = 4


class ModelFamily(NamedTuple):
    """What differs between families beside the weights."""

    pipeline: Any  # diffusers' class of the teacher's pipeline
    text_encoders: Mapping[str, Any]  # classes by folder; a tokenizer's folder is named alike
    guidance_scale: float  # at which students are usually sampled, where guidance is not baked in

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


_SDXL_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
SDXL = ModelFamily(StableDiffusionXLPipeline, _SDXL_ENCODERS, 2.0)
SD = ModelFamily(StableDiffusionPipeline, {"text_encoder": CLIPTextModel}, 4.5)
SD2 = SD._replace(guidance_scale=7.5)


def family_of(unet_config: Mapping[str, Any]) -> ModelFamily:
    """The family of a UNet's configuration.

    Raises:
        ValueError: not a text-to-image UNet of SD 1.5, 2.1 or SDXL, or itself distilled.
    """
    wanted = {"_class_name": "UNet2DConditionModel", "in_channels": LATENT_CHANNELS, "time_cond_proj_dim": None}
    wrong = [f"{key}={unet_config[key]}" for key, value in wanted.items() if unet_config.get(key, value) != value]
    added = unet_config.get("addition_embed_type")
    if wrong or added not in (None, "text_time"):
        raise ValueError(
            f"model.teacher: its UNet with {', '.join(wrong) or f'addition_embed_type={added}'} cannot be distilled; "
            "pass a text-to-image model of Stable Diffusion 1.5, 2.1 or XL that is not distilled itself."
        )
    if added is None:
        return SD2 if unet_config.get("cross_attention_dim") == 1024 else SD
    return SDXL


@dataclass(frozen=True, kw_only=True)
class TeacherSource:
    """A teacher whose configurations were read, and whose weights were not."""

    label: str  # its name for the recipe: the repository, or the last part of a path
    location: str  # repository or directory of the parts; for a single file that of their configurations
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
        return self._load(UNet2DConditionModel, "unet", dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL:
        """The autoencoder on the CPU; one that overflows in half precision comes in float32."""
        upcast = self.vae_config.get("force_upcast", True)
        return self._load(AutoencoderKL, "vae", torch.float32 if upcast else dtype).requires_grad_(False)

    def load_text_pipeline(self, dtype: torch.dtype) -> Any:
        """The family's pipeline with text encoders and tokenizers alone, on the CPU."""
        absent = dict.fromkeys(("unet", "vae", *(() if self.family is SDXL else ("safety_checker", "feature_extractor"))))
        parts: dict[str, Any] = {
            name: CLIPTokenizer.from_pretrained(self.location, subfolder=name, revision=self.revision)
            for name in self.family.tokenizers
        }
        if self.single_file is not None:
            kind, file = self.family.pipeline, self.single_file
            whole = kind.from_single_file(file, config=self.location, dtype=dtype, **parts, **absent)
            encoders = {name: getattr(whole, name) for name in self.family.text_encoders}
        else:
            encoders = {name: self._load(kind, name, dtype) for name, kind in self.family.text_encoders.items()}
        for encoder in encoders.values():
            encoder.eval().requires_grad_(False)
        parts |= encoders | absent | self.pipeline_settings()
        return self.family.pipeline(scheduler=self.scheduler(), **parts)

    def pipeline_settings(self) -> dict[str, Any]:
        """The arguments of the family's pipeline beside its parts."""
        if self.family is not SDXL:
            return {"requires_safety_checker": False}
        zeros = _index(self.location, self.revision).get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}

    def _load(self, kind: Any, folder: str, dtype: torch.dtype) -> Any:
        if self.single_file is not None:
            return kind.from_single_file(self.single_file, config=self.location, subfolder=folder, dtype=dtype).eval()
        where = {"subfolder": folder, "revision": self.revision, "variant": self.variant}
        return kind.from_pretrained(self.location, dtype=dtype, **where).eval()


def open_teacher(model: ModelConfig) -> TeacherSource:
    """Reads the configurations of the teacher's parts, from the Hub where it is there.

    Raises:
        ValueError: nothing is there, a part is missing, or the model's family cannot be distilled.
    """
    label, location, single_file = model.teacher, model.teacher, None
    path = Path(model.teacher)
    if model.teacher == "demo":
        from ..demo import weights_directory

        location = str(weights_directory())
    elif path.is_dir():
        label = path.resolve().name
    elif path.suffix in (".safetensors", ".ckpt"):
        label, single_file = path.stem, str(path)
        location = config_location(model.config, read_shapes(single_file))
    elif path.is_absolute() or model.teacher.startswith((".", "~")) or model.teacher.count("/") != 1:
        raise ValueError(f"model.teacher={model.teacher} does not exist; pass a directory, or owner/name.")
    unet, scheduler, vae = (_part_config(location, part, model.revision) for part in ("unet", "scheduler", "vae"))
    return TeacherSource(
        label=label,
        location=location,
        single_file=single_file,
        revision=model.revision,
        variant=model.variant,
        family=family_of(unet),
        unet_config=unet,
        scheduler_config=scheduler,
        vae_config=vae,
    )


def _part_config(location: str, folder: str, revision: str | None) -> dict[str, Any]:
    loader: Any = DDIMScheduler if folder == "scheduler" else UNet2DConditionModel
    try:
        return dict(loader.load_config(location, subfolder=folder, revision=revision))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.teacher: cannot read the {folder}'s configuration in {location} ({str(error).splitlines()[0]}); "
            "pass a pipeline with a folder for each part."
        ) from error


def _index(location: str, revision: str | None) -> dict[str, Any]:
    """The pipeline's own settings; empty where it has none."""
    for file in (Path(location) / name for name in ("model_index.json", "modular_model_index.json")):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    loader: Any = DiffusionPipeline
    return {} if Path(location).is_dir() else dict(loader.load_config(location, revision=revision))
