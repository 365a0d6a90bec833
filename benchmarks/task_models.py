"""Trains what the embedded model has none of, and draws the images of three task pages with it.

    python -m benchmarks.task_models                            # all three, into runs/task-models and docs
    python -m benchmarks.task_models controlnet --minutes 10

A ControlNet for edges, and an IP-Adapter that takes an image's colours, are trained on the embedded base and used with
its few-step student. A model of Stable Diffusion's architecture is made of the embedded SDXL one, trained on, and
distilled. What is there from an earlier run is kept.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import ControlNetModel, StableDiffusionPipeline
from diffusers.utils import logging
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from perflow_blocks import PeRFlowModularPipeline
from perflow_blocks.atomic_files import atomic_directory
from perflow_blocks.demo import perflow_pipeline, teacher_pipeline
from perflow_blocks.demo.images import IMAGE_SIZE, RenderedImages, all_captions, render_images
from perflow_blocks.demo.models import GUIDANCE_SCALE, CaptionEncoder, build_unet, time_ids
from perflow_blocks.demo.train import SETTINGS, as_long_as, conditioning, encode_images, fit_noise
from perflow_blocks.evaluation.sheet import contact_sheet
from perflow_blocks.testing.tiny import ip_adapter_weights
from perflow_blocks.training.checkpoints import DELTA
from perflow_blocks.training.config import load_config
from perflow_blocks.training.distillation import distill

PROMPTS = ("a red star on a white background", "a big blue ring", "a yellow circle on a navy background")
IP_ADAPTER = "ip-adapter.safetensors"
IMAGES, SEED, UNSEEN = 8_000, 5, 7  # to train on; seeds of these, and of those to draw from
TEACHER_SHARE = 0.4  # of the time, where a student is distilled too
_DROPPED = 0.1  # share of the images that an IP-Adapter learns to do without
_IMAGE_WIDTH = 64  # of its image encoder
_WITHOUT_SDXL: dict[str, Any] = {
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "cross_attention_dim": 64,
}
"""What the UNet of Stable Diffusion 1.5 has in place of the embedded one's settings."""

Cells = list[tuple[Image.Image, str]]


def main(
    parts: Annotated[list[str] | None, typer.Argument(help="controlnet, ip-adapter, stable-diffusion.")] = None,
    out: Annotated[Path, typer.Option(help="Where the models go.")] = Path("runs/task-models"),
    docs: Annotated[Path, typer.Option(help="Where the images go.")] = Path("docs"),
    minutes: Annotated[float, typer.Option(help="Time of the training of each part.")] = 15.0,
) -> None:
    """Train what is missing, and write an image for each part."""
    for part in parts or PARTS:
        train, draw, columns = PARTS[part]
        if not (out / part).is_dir():
            images = render_images(IMAGES, seed=SEED)
            with atomic_directory(out / part) as folder:
                train(images, folder, 60.0 * minutes)
        cells, captions = zip(*draw(out / part), strict=True)
        contact_sheet(cells, captions, columns=columns, scale=2).save(docs / f"{part}.png", optimize=True)


class Base:
    """The embedded base's models, frozen, and what training takes: all captions' token ids, the images' latents."""

    def __init__(self, images: RenderedImages) -> None:
        pipe = teacher_pipeline()
        self.pipe, self.unet = pipe, pipe.unet.requires_grad_(False)
        self.encoder = CaptionEncoder(pipe.tokenizer, pipe.text_encoder, pipe.text_encoder_2).requires_grad_(False)
        self.captions = self.encoder.tokenize(all_captions())
        self.latents = encode_images(pipe.vae, images) * pipe.vae.config.scaling_factor


def edges(image: Image.Image) -> Image.Image:
    """White edges on black."""
    found = image.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda value: 255 * (value > 40))
    frame = Image.new("L", image.size)  # the filter calls an image's border an edge
    frame.paste(found.crop((1, 1, image.width - 1, image.height - 1)), (1, 1))
    return frame.convert("RGB")


def train_controlnet(images: RenderedImages, out: Path, seconds: float) -> None:
    """A ControlNet of the embedded base for the edges of images, as `ControlNetModel.from_pretrained` loads it."""
    base = Base(images)
    # Two strides of 2: as far as the autoencoder of the embedded model reduces an image.
    controlnet: Any = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(16, 32, 64))
    drawn = torch.stack([_pixels(edges(_image(images, number))) for number in range(len(images))])

    def predict(noisy: Tensor, timesteps: Tensor, ids: Tensor, kept: Tensor, numbers: Tensor) -> Tensor:
        embeds, added = conditioning(base.encoder, ids, kept, time_ids(len(ids)))
        given: Any = {"encoder_hidden_states": embeds, "added_cond_kwargs": added, "return_dict": False}
        down, mid = controlnet(noisy, timesteps, controlnet_cond=drawn[numbers].float() / 255.0, **given)
        more = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return base.unet(noisy, timesteps, **given, **more)[0]

    fit_noise(controlnet.train(), predict, base.captions, base.latents, images, seconds=seconds, lr=5e-4)
    controlnet.eval().save_pretrained(out)


def draw_controlnet(models: Path) -> Cells:
    """What prompts become with edges of images that the ControlNet has not seen, and without, from the same noise."""
    pipe, cells = perflow_pipeline(), Cells()
    pipe.update_components(controlnet=ControlNetModel.from_pretrained(models))
    for image, scene in _unseen(3):
        control = edges(image)
        cells.append((control, "control image"))
        for prompt in (f"a red {scene} on a white background", f"a yellow {scene} on a navy background"):
            choices: Any = (({"control_image": control}, prompt), ({}, "the same, without control image"))
            for given, caption in choices:
                cells.append((pipe(prompt, generator=seeded(), **given).images[0], caption))
    return cells


def train_ip_adapter(images: RenderedImages, out: Path, seconds: float) -> None:
    """An IP-Adapter of the embedded base, as `load_ip_adapter` loads it, and the image encoder that it learns with.

    The image that it is given has the colours of the one to be drawn, and another shape, size and place.
    """
    base = Base(images)
    config: Any = {"image_size": IMAGE_SIZE, "patch_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4}
    width = {"hidden_size": _IMAGE_WIDTH, "intermediate_size": 2 * _IMAGE_WIDTH, "projection_dim": _IMAGE_WIDTH}
    image_encoder: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**config, **width))
    processor = CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)
    weights: Any = [ip_adapter_weights(base.unet, 0, _IMAGE_WIDTH)]
    base.pipe.load_ip_adapter(weights, subfolder="", weight_name=[""], image_encoder_folder=None)
    layers = {name: module for name, module in base.unet.named_modules() if hasattr(module, "to_k_ip")}
    trained = nn.ModuleList([image_encoder, base.unet.encoder_hid_proj, *layers.values()]).requires_grad_(True)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    alike = defaultdict(list)
    for number, scene in enumerate(images.scenes):
        alike[scene.color, scene.background].append(number)
    others = [alike[scene.color, scene.background] for scene in images.scenes]
    generator = torch.Generator().manual_seed(SEED)

    def predict(noisy: Tensor, timesteps: Tensor, ids: Tensor, kept: Tensor, numbers: Tensor) -> Tensor:
        embeds, added = conditioning(base.encoder, ids, kept, time_ids(len(ids)))
        places = torch.rand(len(numbers), generator=generator).tolist()
        shown = [others[n][int(place * len(others[n]))] for n, place in zip(numbers.tolist(), places, strict=True)]
        seen = image_encoder((images.pixels[shown] / 255.0 - mean) / deviation).image_embeds
        used = (torch.rand(len(numbers), 1, generator=generator) >= _DROPPED).float()
        given = {**added, "image_embeds": [(seen * used)[:, None]]}
        return base.unet(noisy, timesteps, embeds, added_cond_kwargs=given).sample

    fit_noise(trained, predict, base.captions, base.latents, images, seconds=seconds)
    (projection,) = base.unet.encoder_hid_proj.image_projection_layers
    weights = {f"image_proj.{name.replace('image_embeds', 'proj')}": w for name, w in projection.state_dict().items()}
    for place, layer in enumerate(base.unet.attn_processors.values()):
        if isinstance(layer, nn.Module):  # of the adapter; others have no weights
            weights |= {f"ip_adapter.{place}.{name.replace('.0', '')}": w for name, w in layer.state_dict().items()}
    save_file(weights, out / IP_ADAPTER)
    image_encoder.eval().save_pretrained(out / "image_encoder")
    processor.save_pretrained(out / "feature_extractor")


def draw_ip_adapter(models: Path) -> Cells:
    """Images that the adapter has not seen, and what it makes of prompts that name no colour, at three scales."""
    pipe, cells = perflow_pipeline(), Cells()
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(models / "image_encoder")
    processor = CLIPImageProcessor.from_pretrained(models / "feature_extractor")
    pipe.register_components(image_encoder=image_encoder, feature_extractor=processor)
    pipe.load_ip_adapter(models, subfolder="", weight_name=IP_ADAPTER)
    prompts = ("a star", "a big heart")
    for image, _ in _unseen(3):
        cells.append((image, "given image"))
        for prompt in prompts:
            for scale in (0.0, 0.5, 1.0):
                pipe.set_ip_adapter_scale(scale)
                drawn = pipe(prompt, ip_adapter_image=image, generator=seeded()).images[0]
                cells.append((drawn, f"{prompt}: scale {scale:g}"))
    return cells


def train_stable_diffusion(images: RenderedImages, out: Path, seconds: float) -> None:
    """A model with the parts of Stable Diffusion 1.5 from those of the embedded one, and a delta distilled from it."""
    base, unet = Base(images), build_unet(**_WITHOUT_SDXL)
    half = unet.config.cross_attention_dim
    weights = {name: weight for name, weight in base.unet.state_dict().items() if "add_embedding" not in name}
    # The first of the two text encoders gives the first half of what cross-attention sees.
    text = {name: w[:, :half].clone() for name, w in weights.items() if "attn2.to_k" in name or "attn2.to_v" in name}
    unet.load_state_dict(weights | text)
    pipe = base.pipe
    text_encoder, (nothing,) = pipe.text_encoder.requires_grad_(True), base.encoder.tokenize([""])

    def predict(noisy: Tensor, timesteps: Tensor, ids: Tensor, kept: Tensor, numbers: Tensor) -> Tensor:
        ids = torch.where(kept[:, None] > 0, ids, nothing)
        return unet(noisy, timesteps, text_encoder(ids).last_hidden_state).sample

    model = nn.ModuleList([unet, text_encoder]).train()
    fit_noise(model, predict, base.captions, base.latents, images, seconds=TEACHER_SHARE * seconds)
    parts = {"vae": pipe.vae, "text_encoder": text_encoder, "tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler}
    safety: Any = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(unet=unet.eval(), **parts, **safety).save_pretrained(out)
    overrides = {"model.teacher": str(out), "output.directory": str(out / "student")}
    overrides |= {"output.workflow": "false", "output.validation_every": "null"}
    overrides |= as_long_as((1.0 - TEACHER_SHARE) * seconds, SETTINGS, overrides, out)
    distill(load_config(SETTINGS, overrides))


def draw_stable_diffusion(models: Path) -> Cells:
    """The classic pipeline in many steps and in four, and PeRFlow in four, from the same noise."""
    safety: Any = {"safety_checker": None, "requires_safety_checker": False}
    classic: Any = StableDiffusionPipeline.from_pretrained(models, **safety)
    pipe: Any = PeRFlowModularPipeline.from_pretrained(models)
    pipe.load_components(dtype=torch.float32)
    cells = Cells()
    for prompt in PROMPTS:
        for steps in (50, 4):
            size: Any = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "guidance_scale": GUIDANCE_SCALE}
            image = classic(prompt, num_inference_steps=steps, generator=seeded(), **size).images[0]
            cells.append((image, f"{prompt}: classic, {steps} steps"))
        image = pipe(prompt, delta=models / "student" / DELTA, num_inference_steps=4, generator=seeded()).images[0]
        cells.append((image, "PeRFlow, 4 steps"))
    return cells


def _pixels(image: Image.Image) -> Tensor:
    """(3, height, width) of 8 bits."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _image(images: RenderedImages, number: int) -> Image.Image:
    return Image.fromarray(images.pixels[number].permute(1, 2, 0).numpy())


def _unseen(count: int) -> list[tuple[Image.Image, str]]:
    """The first images of a seed that nothing is trained on, with their shapes."""
    images = render_images(count, seed=UNSEEN)
    return [(_image(images, number), scene.shape) for number, scene in enumerate(images.scenes)]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PARTS: dict[str, Any] = {
    "controlnet": (train_controlnet, draw_controlnet, 5),
    "ip-adapter": (train_ip_adapter, draw_ip_adapter, 7),
    "stable-diffusion": (train_stable_diffusion, draw_stable_diffusion, 3),
}
"""By name of the page: how its models are trained and its image drawn, and the columns of the image."""

if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_flush_denormal(True)
    typer.run(main)
