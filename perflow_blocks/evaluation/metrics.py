"""torchmetrics' measures in the form that `evaluate_samplers` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from .measure import EvaluationSet, Scorer

MOST_PSNR = 100.0  # decibels that equal images count as, whose PSNR is infinite


def closeness(target: Tensor) -> Scorer:
    """PSNR in decibels and SSIM to images (count, 3, height, width) of 8 bits."""

    def score(images: Tensor, where: slice) -> Mapping[str, Tensor]:
        wanted = target[where].float() / 255.0
        psnr = peak_signal_noise_ratio(images, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(images, wanted, data_range=1.0, reduction="none")
        return {"PSNR dB": psnr.clamp(max=MOST_PSNR), "SSIM": ssim.reshape(-1)}

    return score


def clip_scorer(network: str, prompts: Sequence[str], device: torch.device) -> Scorer:
    """The CLIP score (arXiv 2104.08718) of each image and its prompt: 100 times the cosine, at least 0.

    `network` is the repository or directory of a CLIP model of transformers.
    """
    encoder = ClipFeatures(network, device)
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}

    @torch.no_grad()
    def score(images: Tensor, where: slice) -> Mapping[str, Tensor]:
        tokens = encoder.processor.tokenizer(list(prompts[where]), **options).to(device)
        texts = encoder.model.get_text_features(**tokens).pooler_output
        return {"CLIP score": 100.0 * cosine_similarity(encoder(images.to(device)), texts).clamp(min=0)}

    return score


def evaluation_set(
    prompts: Sequence[str],
    latents: Tensor,
    *,
    features: str | None = None,
    reference: Path | None = None,
    device: torch.device,
) -> EvaluationSet:
    """A set with FID and KID, where a network for them is named.

    `features` is "inception", which needs the package torch-fidelity, or the repository or directory of a CLIP model;
    `reference` a folder of at least 2 images, or None for the teacher's.
    """
    if features is None:
        return EvaluationSet(prompts=prompts, latents=latents)
    endings = Image.registered_extensions()
    files = [path for path in sorted(reference.rglob("*")) if path.suffix.lower() in endings] if reference else []
    if reference and len(files) < 2:
        raise ValueError(f"--reference {reference} holds {len(files)} images; name a folder with at least 2.")
    distances = set_distances(features, min(len(prompts), len(files) or len(prompts)), device)
    for file in files:
        with Image.open(file) as image:
            levels = torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))
        for metric in distances.values():
            metric.update(levels.permute(2, 0, 1)[None].to(device) / 255.0, real=True)
    return EvaluationSet(prompts=prompts, latents=latents, distances=distances, to_teacher=not files)


def set_distances(network: str, count: int, device: torch.device) -> dict[str, Any]:
    """FID and KID, which have seen no image; KID compares subsets of half the smaller set's `count`, at most 1,000."""
    options = {
        "feature": 2048 if network == "inception" else ClipFeatures(network, device),
        "normalize": True,  # images are in [0, 1]
        "reset_real_features": False,
    }
    kernel = KernelInceptionDistance(**options, subset_size=min(1000, max(2, count // 2)))
    return {"FID": FrechetInceptionDistance(**options).to(device), "KID": kernel.to(device)}


class ClipFeatures(nn.Module):
    """CLIP's image embeddings in the form that torchmetrics asks for."""

    def __init__(self, network: str, device: torch.device) -> None:
        from transformers import CLIPModel, CLIPProcessor

        super().__init__()
        model: Any = CLIPModel.from_pretrained(network)
        self.model, self.processor = model.to(device).eval(), CLIPProcessor.from_pretrained(network)
        self.num_features: int = self.model.config.projection_dim

    def forward(self, images: Tensor) -> Tensor:
        levels = list((255.0 * images).round().to("cpu", torch.uint8))
        pixels = self.processor.image_processor(levels, return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixels.to(images.device)).pooler_output
