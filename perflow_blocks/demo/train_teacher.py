"""Trains the demo's teacher: a text-conditioned epsilon model with its two text encoders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .conditioning import CaptionEncoder
from .data import RenderedPictures
from .models import build_teacher_scheduler, build_text_encoders, build_tokenizer, build_unet, time_ids
from .pictures import Prompt

_CAPTION_DROPOUT = 0.12
_NOISY_SHARE = 0.6  # share of the timesteps drawn from the noisier half
_MAX_WEIGHT = 60.0
_CHECKPOINT_EVERY = 250


def train_teacher(
    latents: torch.Tensor,
    pictures: RenderedPictures,
    out: Path,
    *,
    steps: int = 3800,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> tuple[UNet2DConditionModel, CaptionEncoder]:
    """Trains UNet and text encoders jointly and saves the averaged weights under `out`.

    Training goes on from `out/teacher_state.pt` when it exists, as if it had not been interrupted.

    The noise prediction's error is weighted by min(1/abar, 60), which makes it an error of the picture at high noise;
    plain weighting hardly teaches colour there, since a picture of the wrong colour is a small error of the noise.

    Args:
        latents: scaled latents of `pictures`, (count, 4, 16, 16).
        pictures: their scenes give the captions.
        out: directory for `unet`, `text_encoder`, `text_encoder_2`, `tokenizer`, `tokenizer_2`, `scheduler`.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encoder = CaptionEncoder(tokenizer, *build_text_encoders(tokenizer))
    unet = build_unet()
    fit_teacher(unet, encoder, latents, pictures, out, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    save_teacher(unet, encoder, out)
    return unet, encoder


def fit_teacher(
    unet: UNet2DConditionModel,
    encoder: CaptionEncoder,
    latents: torch.Tensor,
    pictures: RenderedPictures,
    out: Path,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Trains the weights of `unet` and `encoder` that require gradients, in place; they end as their average.

    The other arguments are those of `train_teacher`. Training goes on from `out/teacher_state.pt` when it exists.
    """
    unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor())  # faster than SDPA in CPU training at these sizes
    model = torch.nn.ModuleDict({"unet": unet, "encoder": encoder})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.04)
    ema = EMAModel(trained, decay=0.999)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "ema": ema}
    checkpoint = Checkpoint(out / "teacher_state.pt", parts)
    start = checkpoint.load()
    progress = tqdm(range(start, steps), desc="teacher", unit="step", initial=start, total=steps)
    for step in progress:
        loss = teacher_loss(unet, encoder, latents, pictures, batch_size, (seed, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        ema.step(trained)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % _CHECKPOINT_EVERY == 0:
            checkpoint.save(step + 1)
    ema.copy_to(trained)


def teacher_loss(
    unet: UNet2DConditionModel,
    encoder: CaptionEncoder,
    latents: torch.Tensor,
    pictures: RenderedPictures,
    batch_size: int,
    seed: tuple[int, int],
) -> torch.Tensor:
    """The weighted error of the predicted noise on a random batch that `seed` decides, a scalar."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
    scheduler = build_teacher_scheduler()
    indices = torch.randint(len(pictures), (batch_size,), generator=generator)
    captions = [Prompt.describe(pictures.scenes[index], rng).text for index in indices.tolist()]
    dropped = torch.rand(batch_size, generator=generator) < _CAPTION_DROPOUT
    text = encoder(captions).drop(dropped)
    timesteps = draw_timesteps(batch_size, generator)
    noise = torch.randn(batch_size, *latents.shape[1:], generator=generator)
    noisy = scheduler.add_noise(latents[indices], noise, timesteps)
    prediction = unet(
        noisy.contiguous(memory_format=torch.channels_last),
        timesteps,
        text.prompt_embeds,
        added_cond_kwargs={"text_embeds": text.pooled_prompt_embeds, "time_ids": time_ids(batch_size)},
        return_dict=False,
    )[0]
    weight = (1 / scheduler.alphas_cumprod[timesteps]).clamp(max=_MAX_WEIGHT)
    return ((prediction - noise).square().mean((1, 2, 3)) * weight).mean()


def draw_timesteps(count: int, generator: torch.Generator) -> torch.Tensor:
    """Timesteps in [0, 1000), (count,), more than half of them from the noisier half."""
    noisy = torch.rand(count, generator=generator) < _NOISY_SHARE
    return torch.randint(0, 500, (count,), generator=generator) + 500 * noisy.long()


def save_teacher(unet: UNet2DConditionModel, encoder: CaptionEncoder, out: Path) -> None:
    """Writes the teacher as the sub-folders of a diffusers pipeline, in the dtype it has."""
    unet.save_pretrained(out / "unet")
    encoder.text_encoder.save_pretrained(out / "text_encoder")
    encoder.text_encoder_2.save_pretrained(out / "text_encoder_2")
    encoder.tokenizer.save_pretrained(out / "tokenizer")
    encoder.tokenizer.save_pretrained(out / "tokenizer_2")
    build_teacher_scheduler().save_pretrained(out / "scheduler")
