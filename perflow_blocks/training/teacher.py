"""The frozen teacher: where its parts come from, how it encodes prompts and images, and how it solves windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ..core.distillation import draw_times
from ..core.noise_schedule import make_alphas_cumprod
from ..core.parameterization import WindowAlpha, window_table
from ..schedulers import PFODESolver
from ..schedulers.pfode_solver import Conditioning, sdxl_conditioning
from ..schedulers.scheduling_perflow import NOISE_SCHEDULE_KEYS
from .buckets import Size
from .config import ModelConfig, TeacherConfig, WindowConfig

LATENT_CHANNELS = 4
_ROUNDING = 1e-3  # of a step between two discrete times: far above float32's rounding

Offload = Callable[[], Any]
"""Takes models back to the host's memory."""

Sizes = tuple[Size, Size, Size]
"""What SDXL's time ids say of an image, each (height, width): original size, corner of the crop, size of the crop."""


class ModelFamily(NamedTuple):
    """What differs between families beside the weights."""

    pipeline: Any  # diffusers' class of the teacher's pipeline
    text_encoders: Mapping[str, Any]  # classes by folder; a tokenizer's folder is named alike
    guidance_scale: float  # at which students are usually sampled, where guidance is not baked in
    unet: Any = UNet2DConditionModel

    @property
    def tokenizers(self) -> tuple[str, ...]:
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoders)


_SDXL_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
SDXL = ModelFamily(StableDiffusionXLPipeline, _SDXL_ENCODERS, 2.0)
SD = ModelFamily(diffusers.StableDiffusionPipeline, {"text_encoder": CLIPTextModel}, 4.5)
SD2 = SD._replace(guidance_scale=7.5)
UNCONDITIONAL = ModelFamily(diffusers.DDPMPipeline, {}, 1.0, UNet2DModel)
"""Of pixels, without text encoders and VAE."""


def family_of(unet_config: Mapping[str, Any]) -> ModelFamily:
    """The family of a UNet's configuration. Raises ValueError for any other, and for what is itself distilled."""
    if unet_config.get("_class_name") == "UNet2DModel":
        return UNCONDITIONAL
    wanted = {"_class_name": "UNet2DConditionModel", "in_channels": LATENT_CHANNELS, "time_cond_proj_dim": None}
    wrong = [f"{key}={unet_config[key]}" for key, value in wanted.items() if unet_config.get(key, value) != value]
    added = unet_config.get("addition_embed_type")
    if wrong or added not in (None, "text_time"):
        raise ValueError(
            f"model.teacher: its UNet with {', '.join(wrong) or f'addition_embed_type={added}'} cannot be distilled; "
            "pass a model of Stable Diffusion 1.5, 2.1 or XL that is not distilled itself, or an unconditional one."
        )
    if added is None:
        return SD2 if unet_config.get("cross_attention_dim") == 1024 else SD
    return SDXL


@dataclass(frozen=True)
class TeacherSource:
    """A teacher whose configurations were read, and whose weights were not."""

    label: str  # its name for the recipe: the repository, or the last part of a path
    location: str  # repository or directory of the parts
    model: ModelConfig
    family: ModelFamily
    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    vae_config: Mapping[str, Any] | None  # None: the UNet works on pixels

    @property
    def on_hub(self) -> bool:
        """Whether its parts are in a repository of the Hub, which others can read too."""
        return not Path(self.location).exists()

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along a side."""
        return 1 if self.vae_config is None else 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @property
    def channels(self) -> int:
        """Of latents, or of pixels."""
        return self.unet_config.get("in_channels", LATENT_CHANNELS)

    def scheduler(self) -> DDIMScheduler:
        """The noise schedule as DDIM's, ending at the abar that the windows end at."""
        return DDIMScheduler.from_config(FrozenDict(self.scheduler_config), set_alpha_to_one=False)

    def load_unet(self, dtype: torch.dtype = torch.float32) -> Any:
        """A new copy of the teacher's UNet on the CPU, in evaluation mode."""
        return self._load(self.family.unet, "unet", dtype)

    def load_vae(self, dtype: torch.dtype) -> AutoencoderKL | None:
        """The autoencoder on the CPU, if there is one; one that overflows in half precision comes in float32."""
        if self.vae_config is None:
            return None
        upcast = self.vae_config.get("force_upcast", True)
        return self._load(AutoencoderKL, "vae", torch.float32 if upcast else dtype).requires_grad_(False)

    def load_text_pipeline(self, dtype: torch.dtype) -> Any:
        """The family's pipeline with text encoders and tokenizers alone, on the CPU; None where it has none."""
        if not self.family.text_encoders:
            return None
        parts: dict[str, Any] = {
            name: CLIPTokenizer.from_pretrained(self.location, subfolder=name, revision=self.model.revision)
            for name in self.family.tokenizers
        }
        for name, kind in self.family.text_encoders.items():
            parts[name] = self._load(kind, name, dtype).requires_grad_(False)
        parts |= {"unet": None, "vae": None, "scheduler": self.scheduler()}
        if self.family is not SDXL:
            safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return self.family.pipeline(**parts, **safety)
        zeros = _index(self.location, self.model.revision).get("force_zeros_for_empty_prompt", True)
        return self.family.pipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)

    def _load(self, kind: Any, folder: str, dtype: torch.dtype) -> Any:
        where = {"subfolder": folder, "revision": self.model.revision, "variant": self.model.variant}
        return kind.from_pretrained(self.location, dtype=dtype, **where).eval()


def open_teacher(model: ModelConfig) -> TeacherSource:
    """Reads the configurations of the teacher's parts. Raises ValueError or OSError where they are absent or unfit."""
    label, location, path = model.teacher, model.teacher, Path(model.teacher)
    if model.teacher == "demo":
        location = str(files("perflow_blocks.demo") / "weights")
    elif path.is_dir():
        label = path.resolve().name
    elif path.suffix in (".safetensors", ".ckpt"):
        raise ValueError(
            f"model.teacher={model.teacher} is a single file; pass a directory, which "
            "StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(DIRECTORY) makes of it."
        )
    elif path.is_absolute() or model.teacher.startswith((".", "~")) or model.teacher.count("/") != 1:
        raise ValueError(f"model.teacher={model.teacher} does not exist; pass a directory, or owner/name.")
    kinds: dict[str, Any] = {"unet": UNet2DConditionModel, "scheduler": DDIMScheduler, "vae": AutoencoderKL}

    def config_of(part: str) -> dict[str, Any]:
        return dict(kinds[part].load_config(location, subfolder=part, revision=model.revision))

    unet, scheduler = config_of("unet"), config_of("scheduler")
    family = family_of(unet)
    vae = None if family is UNCONDITIONAL else config_of("vae")
    return TeacherSource(label, location, model, family, unet, scheduler, vae)


def _index(location: str, revision: str | None) -> dict[str, Any]:
    """The pipeline's own settings; empty where it has none."""
    for file in (Path(location) / name for name in ("model_index.json", "modular_model_index.json")):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    loader: Any = diffusers.DiffusionPipeline
    return {} if Path(location).is_dir() else dict(loader.load_config(location, revision=revision))


class WindowGeometry:
    """The windows of a configuration on a teacher's noise schedule, with the numbers of each on a device."""

    def __init__(
        self, config: WindowConfig, scheduler_config: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        schedule = {key: scheduler_config[key] for key in NOISE_SCHEDULE_KEYS if scheduler_config.get(key) is not None}
        alphas_cumprod = make_alphas_cumprod(**schedule)
        self.config = config
        self.num_train_timesteps = len(alphas_cumprod)
        self.windows = config.tile(self.num_train_timesteps)
        self._rows = torch.tensor(window_table(self.windows, alphas_cumprod), dtype=torch.float32, device=device)

    @property
    def num_windows(self) -> int:
        return self.windows.num_windows

    def rows(self, index: Tensor) -> WindowAlpha:
        """The windows of the given indices (batch,), each number a float32 tensor of that shape."""
        return WindowAlpha(*self._rows[index].unbind(-1))

    def each(self, count: int) -> list[WindowAlpha]:
        """For each window, noisiest first, its numbers `count` times over."""
        return [WindowAlpha(*row[:, None].expand(-1, count)) for row in self._rows]

    def times(self, window: WindowAlpha, uniform: Tensor) -> Tensor:
        """Training times (batch,) in each row's window, from numbers (batch,) uniform in [0, 1)."""
        t = draw_times(window, uniform, start_share=self.config.start_share)
        if self.config.times == "continuous":
            return t
        count = self.config.num_discrete_times
        # Up to the next of the equidistant times, which lies beyond the window's end and not beyond its start.
        first = torch.floor(torch.as_tensor(window.end) * count + _ROUNDING) + 1
        snapped = torch.maximum(torch.ceil(t * count - _ROUNDING), first) / count
        return torch.minimum(snapped, torch.as_tensor(window.start))

    def solver_times(self, t: Tensor) -> Tensor:
        """The times, up to a timestep below, at which the teacher's solver has the noise of the windows' numbers at t.

        Between two timesteps the windows have the noise of the lower one, and the solver that of the nearer one.
        """
        timestep = torch.floor(t * self.num_train_timesteps + _ROUNDING).clamp(1, self.num_train_timesteps)
        return torch.minimum(t, timestep / self.num_train_timesteps)

    def solver_windows(self, steps_per_window: int) -> int | None:
        """The solver's `num_windows`: its stride as published where that ends at the windows' ends, else None."""
        divides = self.num_train_timesteps % (self.num_windows * steps_per_window) == 0
        return self.num_windows if self.config.window_boundaries is None and divides else None


def cast(conditioning: Conditioning, dtype: torch.dtype) -> Conditioning:
    """The conditions in a type; time ids, which half precision would round, stay as they are."""
    return Conditioning(
        prompt_embeds=conditioning.prompt_embeds.to(dtype),
        added={name: value if name == "time_ids" else value.to(dtype) for name, value in conditioning.added.items()},
    )


class PromptEncoder:
    """Encodes prompts as the teacher's pipeline does, then calls `offload`; keeps embeddings of `cache` prompts.

    Without a pipeline the embeddings of all prompts are empty, (batch, 0).
    """

    def __init__(self, pipeline: Any, device: torch.device, cache: int, offload: Offload | None = None) -> None:
        self._pipeline, self._device = pipeline, device
        self._added_conditions = isinstance(pipeline, StableDiffusionXLPipeline)
        self._offload = offload or (lambda: None)
        self._row = lru_cache(maxsize=cache)(self._encode)
        self._empty = self._encode("", negative=True)  # as the pipeline has it for guidance: of SDXL mostly zeros
        self._offload()

    def conditioning(
        self, prompts: Sequence[str], sizes: Sequence[Sizes], drop: Sequence[bool] | None = None
    ) -> Conditioning:
        """The conditions (batch, ...) of a prompt and the sizes for each row; the empty prompt where `drop` says so.

        Each prompt is encoded by itself: its rounding depends on what else is in a batch, and a run that is resumed,
        with nothing kept, has to get the same embeddings.
        """
        before = self._row.cache_info().misses
        dropped = drop or [False] * len(prompts)
        rows = [self._empty if out else self._row(prompt) for prompt, out in zip(prompts, dropped, strict=True)]
        if self._row.cache_info().misses > before:
            self._offload()
        embeds, pooled = (torch.stack(parts) for parts in zip(*rows, strict=True))
        if not self._added_conditions:
            return Conditioning(prompt_embeds=embeds)
        time_ids = torch.tensor([[side for size in three for side in size] for three in sizes], dtype=torch.float32)
        return sdxl_conditioning(embeds, pooled, time_ids.to(self._device, non_blocking=True))

    def empty(self, like: Conditioning) -> Conditioning:
        """The conditions that guidance leads away from, with the time ids of `like`."""
        embeds, pooled = (part.expand(len(like.prompt_embeds), *part.shape) for part in self._empty)
        if not self._added_conditions:
            return Conditioning(prompt_embeds=embeds)
        return sdxl_conditioning(embeds, pooled, like.added["time_ids"])

    @torch.no_grad()
    def _encode(self, prompt: str, *, negative: bool = False) -> tuple[Tensor, Tensor]:
        """A prompt's embeddings (tokens, width) and, of SDXL, pooled (width,); or those of the negative prompt."""
        if self._pipeline is None:
            return torch.empty(0, device=self._device), torch.empty(0, device=self._device)
        found = self._pipeline.encode_prompt(
            prompt=[prompt], device=self._device, num_images_per_prompt=1, do_classifier_free_guidance=negative
        )
        # Positive and negative embeddings, and for SDXL then the same pooled.
        own = found[int(negative) :: 2]
        return own[0][0], own[1][0] if self._added_conditions else own[0].new_zeros(0)


class LatentEncoder:
    """The teacher's VAE, or None for a teacher of pixels; `offload` is called when images were encoded."""

    def __init__(self, vae: Any, device: torch.device, offload: Offload | None = None) -> None:
        self._vae, self._device, self._offload = vae, device, offload or (lambda: None)

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Latents (batch, 4, height/f, width/f) float32 of pixels (batch, 3, height, width) in [-1, 1] on the host."""
        if self._vae is None:
            return pixels.to(self._device)
        distribution = self._vae.encode(pixels.to(self._device, self._vae.dtype)).latent_dist
        self._offload()
        latents = DiagonalGaussianDistribution(distribution.parameters.float()).sample(generator)
        return latents * self._vae.config.scaling_factor


class Teacher:
    """Solves the probability-flow ODE of a frozen UNet across windows, in the context that `at_hand` makes."""

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        encoder: PromptEncoder,
        geometry: WindowGeometry,
        config: TeacherConfig,
        at_hand: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.unet, self.encoder, self.geometry, self.config = unet, encoder, geometry, config
        self.at_hand, self._solver = at_hand, PFODESolver(scheduler, order=config.order)

    def solve(self, z_start: Tensor, window: WindowAlpha, conditioning: Conditioning) -> Tensor:
        """The ends (batch, channels, height, width) of windows that begin at `z_start`; each row has its own window.

        Under "fixed" guidance a prompt that was dropped is solved like any other: guidance from it to itself is none.
        """
        start, end = (self.geometry.solver_times(torch.as_tensor(t)) for t in (window.start, window.end))
        scale = self.config.guidance_scale if self.config.cfg_mode == "fixed" else 1.0
        steps = self.config.steps_per_window
        windows = self.geometry.solver_windows(steps)
        return self.solve_between(z_start, start, end, conditioning, scale, num_steps=steps, num_windows=windows)

    def solve_between(
        self, z_start: Tensor, start: Tensor, end: Tensor, conditioning: Conditioning, scale: float, **steps: Any
    ) -> Tensor:
        """As `PFODESolver.solve_conditioned`, with a guidance of `scale`."""
        dtype = getattr(torch, self.config.dtype)
        positive, negative = cast(conditioning, dtype), None
        if scale > 1.0:
            negative = cast(self.encoder.empty(conditioning), dtype)
        steps["guidance_scale"] = scale
        with self.at_hand():
            return self._solver.solve_conditioned(z_start, self.unet, start, end, positive, negative, **steps)


@contextmanager
def between(before: Callable[[], Any], after: Callable[[], Any]) -> Iterator[None]:
    """Calls one function at the beginning and one at the end."""
    before()
    try:
        yield
    finally:
        after()
