"""Makes the demo model from nothing: `python -m perflow_blocks.demo.train --out runs/demo`.

Autoencoder and teacher; the base that these are in half precision, and the student that is distilled from it as
`distill.toml` says; then base and delta are published. Every stage keeps its result under `--out` and is skipped when
that exists, and teacher and student go on from their last checkpoint, so an interrupted run loses minutes.
`--student RUN` publishes the delta of what `perflow distill` made of the embedded base, and trains nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..atomic_files import atomic_directory, atomic_path
from ..delta.extract import extract_delta, save_delta
from ..delta.files import listed, read_recipe
from ..training.checkpoints import DELTA as RUN_DELTA
from ..training.checkpoints import REPORT, STUDENT
from ..training.config import load_config
from ..training.distillation import distill
from .blocks import DELTA
from .images import IMAGE_SIZE, Prompt, RenderedImages, render_images
from .models import CaptionEncoder, build_caption_encoder, build_teacher_scheduler, build_unet, build_vae, time_ids

SETTINGS, WEIGHTS = Path(__file__).parent / "distill.toml", Path(__file__).parent / "weights"
BASE_NAME = "perflow_blocks demo teacher"
CHECKPOINT_EVERY = 250
_CROP = 32
_KL_WEIGHT = 1e-6
_BACKGROUND_WEIGHT = 0.3  # the background is most of an image and is learnt first
_CAPTION_DROPOUT = 0.12
_NOISY_SHARE = 0.6  # share of the timesteps drawn from the noisier half
_MAX_WEIGHT = 60.0


def main(
    out: Annotated[Path, typer.Option(help="Where checkpoints and full-precision results go.")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="Where the half-precision model goes.")] = WEIGHTS,
    teacher_steps: Annotated[int, typer.Option(help="Training steps of the teacher.")] = 3800,
    settings: Annotated[Path, typer.Option(help="Of the student, as `perflow distill` takes them.")] = SETTINGS,
    student: Annotated[Path | None, typer.Option(help="A finished distillation to publish; trains nothing.")] = None,
) -> None:
    """Train every part of the demo model."""
    if student is not None:
        publish(student, weights)
        return
    base, run = out / "base", out / "distillation"
    if not base.is_dir():
        images = render_images(32_000, seed=1)
        done = (out / "vae").is_dir()
        vae = AutoencoderKL.from_pretrained(out / "vae") if done else train_vae(images, out / "vae")
        latents = encode_images(vae, images) * vae.config.scaling_factor
        torch.manual_seed(0)
        encoder, unet = build_caption_encoder(), build_unet()
        train_teacher(unet, encoder, latents, images, out, steps=teacher_steps)
        save_base(vae, unet, encoder, base)
    if not (run / REPORT).exists():  # what is written last
        overrides = {"model.teacher": str(base), "output.directory": str(run), "output.resume": "latest"}
        distill(load_config(settings, overrides))
    publish(run, weights, base)


def publish(run: Path, weights: Path, base: Path | None = None) -> None:
    """Writes the delta of a finished distillation of full weights into `weights`.

    `base` is what `save_base` wrote, to be put there as well; by default `weights` has it already. Nothing is written
    where the delta does not lead from this base to the student.
    """
    unet = UNet2DConditionModel.from_pretrained(base or weights, subfolder="unet", dtype=torch.float32)
    student = UNet2DConditionModel.from_pretrained(run / STUDENT, dtype=torch.float32)
    delta, whole = load_file(run / RUN_DELTA), extract_delta(student, unet)
    stored = {name: delta.get(name, torch.zeros(change.shape)) for name, change in whole.items()}
    wrong = [name for name in whole if not torch.equal(whole[name].to(stored[name].dtype), stored[name])]
    if wrong:
        what = f"{run / RUN_DELTA} does not lead from the base that is published to the student ({listed(wrong)})"
        raise ValueError(f"{what}; distil from that base.")
    recipe = replace(read_recipe(run / RUN_DELTA), base_model=BASE_NAME)
    if base is not None:
        shutil.copytree(base, weights, dirs_exist_ok=True)
    save_delta(delta, weights / DELTA, recipe, partial=len(delta) < len(whole))


def save_base(vae: AutoencoderKL, unet: UNet2DConditionModel, encoder: CaptionEncoder, directory: Path) -> None:
    """Writes the base as a folder for each part, in half precision, from which the student is distilled too."""
    with atomic_directory(directory) as temporary:
        unet.half().save_pretrained(temporary / "unet")
        vae.half().save_pretrained(temporary / "vae")
        for name in ("text_encoder", "text_encoder_2"):
            model = getattr(encoder, name).half()
            model.save_pretrained(temporary / name)
            # transformers loads the type that a config names, diffusers float32: make both load the same.
            model.config.dtype = torch.float32
            model.config.save_pretrained(temporary / name)
            encoder.tokenizer.save_pretrained(temporary / name.replace("text_encoder", "tokenizer"))
        build_teacher_scheduler().save_pretrained(temporary / "scheduler")


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    warmup: float = 0.05,
    ema_decay: float = 0.0,
    checkpoint: Path | None = None,
) -> None:
    """Trains what requires gradients, in place and to its average, from `checkpoint` on where that exists."""
    if steps < 3:
        raise ValueError(f"steps={steps} is below 3; pass at least 3.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    # A warm-up of one step or less would divide by zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=max(warmup, 2 / steps))
    ema = EMAModel(trained, decay=ema_decay)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    start = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        start = state["done"]
        if state["steps"] != steps:
            raise ValueError(f"{checkpoint} is of {state['steps']} steps, not {steps}; pass its number, or remove it.")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in tqdm(range(start, steps), desc=type(model).__name__, unit="step", initial=start, total=steps):
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(trained)
        if checkpoint is not None and (step + 1) % CHECKPOINT_EVERY == 0:
            with atomic_path(checkpoint) as temporary:
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**states, "done": step + 1, "steps": steps}, temporary)
    ema.copy_to(trained)


def train_vae(images: RenderedImages, out: Path, *, steps: int = 3200, batch_size: int = 24) -> AutoencoderKL:
    """Trains a VAE and saves it, its `scaling_factor` set to one over the latents' deviation.

    The loss is the absolute error, weighted towards the foreground, with a small KL term, on random crops, which teach
    the same at a quarter of the cost.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = build_vae().to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        whole = images.batch(torch.randint(len(images), (batch_size,), generator=generator))
        top, left = torch.randint(IMAGE_SIZE - _CROP + 1, (2,), generator=generator).tolist()
        crop = whole[..., top : top + _CROP, left : left + _CROP].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(crop).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - crop).abs()
        foreground = ((crop - whole[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        weight = _BACKGROUND_WEIGHT + (1 - _BACKGROUND_WEIGHT) * foreground
        return (error * weight).mean() / weight.mean() + _KL_WEIGHT * posterior.kl().mean()

    fit(vae, loss, steps=steps, lr=2e-3)
    vae.eval()
    vae.register_to_config(scaling_factor=float(1.0 / encode_images(vae, images, limit=2048).std()))
    vae.save_pretrained(out)
    return vae


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: RenderedImages, *, limit: int | None = None) -> Tensor:
    """Posterior means of the first `limit` images, unscaled: (count, 4, 16, 16)."""
    chunks = tqdm(torch.arange(len(images))[:limit].split(128), desc="encode", unit="batch")
    return torch.cat([vae.encode(images.batch(chunk)).latent_dist.mode() for chunk in chunks])


def train_teacher(
    unet: UNet2DConditionModel,
    encoder: CaptionEncoder,
    latents: Tensor,
    images: RenderedImages,
    out: Path,
    *,
    steps: int,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Trains the weights of `unet` and `encoder` that require gradients, in place, with a checkpoint in `out`.

    `latents` (count, 4, 16, 16) are the scaled ones of `images`, whose scenes give the captions. The error of the
    noise is weighted by min(1/abar, 60), which makes it an error of the image at high noise; plain weighting hardly
    teaches colour there, since an image of the wrong colour is a small error of the noise.
    """
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # faster than SDPA in CPU training at these sizes
    scheduler = build_teacher_scheduler()

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        indices = torch.randint(len(images), (batch_size,), generator=generator)
        captions = [Prompt.describe(images.scenes[index], rng).text for index in indices.tolist()]
        kept = (torch.rand(batch_size, generator=generator) >= _CAPTION_DROPOUT).float()
        embeds, pooled = encoder(captions)
        noisy_half = torch.rand(batch_size, generator=generator) < _NOISY_SHARE
        timesteps = torch.randint(0, 500, (batch_size,), generator=generator) + 500 * noisy_half.long()
        noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
        noisy = scheduler.add_noise(latents[indices], noise, timesteps)
        prediction = unet(
            noisy.contiguous(memory_format=torch.channels_last),
            timesteps,
            embeds * kept[:, None, None],  # in SDXL the empty prompt is all zeros
            added_cond_kwargs={"text_embeds": pooled * kept[:, None], "time_ids": time_ids(batch_size)},
            return_dict=False,
        )[0]
        weight = (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=_MAX_WEIGHT)
        return ((prediction - noise).square().mean((1, 2, 3)) * weight).mean()

    model = nn.ModuleDict({"unet": unet, "encoder": encoder})
    checkpoint = out / "teacher_state.pt"
    settings = {"beta2": 0.99, "weight_decay": 1e-2, "warmup": 0.04, "ema_decay": 0.999}
    fit(model, loss, steps=steps, lr=lr, checkpoint=checkpoint, **settings)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    typer.run(main)
