"""Trains the demo's autoencoder on rendered pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from .data import RenderedPictures
from .models import build_vae
from .pictures import PICTURE_SIZE

_CROP = 32
_KL_WEIGHT = 1e-6
_BACKGROUND_WEIGHT = 0.3  # the background is most of a picture and is learnt first


def train_vae(
    pictures: RenderedPictures, out: Path, *, steps: int = 3200, batch_size: int = 24, lr: float = 2e-3, seed: int = 0
) -> AutoencoderKL:
    """Trains a VAE for `steps` steps and saves it, its `scaling_factor` set to one over the latents' deviation.

    The loss is the absolute error, weighted towards pixels that differ from the picture's background, with a small KL
    term, on random crops: the autoencoder is convolutional, so crops teach the same at a quarter of the cost.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="vae", unit="step")
    for step in progress:
        indices = torch.randint(len(pictures), (batch_size,), generator=generator)
        whole = pictures.batch(indices)
        top, left = torch.randint(PICTURE_SIZE - _CROP + 1, (2,), generator=generator).tolist()
        images = whole[..., top : top + _CROP, left : left + _CROP].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        error = (vae.decode(posterior.sample(generator)).sample - images).abs()
        foreground = ((images - whole[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
        weight = _BACKGROUND_WEIGHT + (1 - _BACKGROUND_WEIGHT) * foreground
        loss = (error * weight).mean() / weight.mean() + _KL_WEIGHT * posterior.kl().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()
    sample = encode_pictures(vae, pictures, limit=2048)
    vae.register_to_config(scaling_factor=float(1.0 / sample.std()))
    vae.save_pretrained(out)
    return vae


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, pictures: RenderedPictures, *, limit: int | None = None, batch_size: int = 128
) -> torch.Tensor:
    """Posterior means of the first `limit` pictures, unscaled: (count, 4, 16, 16)."""
    indices = torch.arange(len(pictures) if limit is None else min(limit, len(pictures)))
    chunks = tqdm(indices.split(batch_size), desc="encode", unit="batch")
    return torch.cat([vae.encode(pictures.batch(chunk)).latent_dist.mode() for chunk in chunks])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pictures: RenderedPictures) -> float:
    """Peak signal-to-noise ratio of decoded posterior means, in decibels."""
    images = pictures.batch(torch.arange(min(256, len(pictures))))
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    return float(10 * torch.log10(4.0 / F.mse_loss(decoded, images)))
