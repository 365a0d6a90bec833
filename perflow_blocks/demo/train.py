"""Makes the demo model from nothing: `python -m perflow_blocks.demo.train --device cuda --minutes 8`.

Autoencoder and teacher; the base that these are in half precision, and the student that is distilled from it as
`distill.toml` says; then base and delta are published. Every stage keeps its result under `--out` and is skipped when
that exists, and teacher and student go on from their last checkpoint, so an interrupted run loses minutes. On a CPU
the same takes hours. `--start perflow_blocks/demo/weights` trains the teacher of a model on.
`--student RUN` publishes the delta of what `perflow distill` made of the embedded base, and trains nothing.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

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
from ..training.checkpoints import METRICS, REPORT, STUDENT
from ..training.config import load_config
from ..training.distillation import distill
from .blocks import DELTA
from .images import ATTRIBUTES, IMAGE_SIZE, RenderedImages, all_captions, caption_numbers, render_images
from .models import CaptionEncoder, build_caption_encoder, build_teacher_scheduler, build_unet, build_vae, time_ids

SETTINGS, WEIGHTS = Path(__file__).parent / "distill.toml", Path(__file__).parent / "weights"
BASE_NAME = "perflow_blocks demo teacher"
CHECKPOINT_EVERY = 250
IMAGES = {"cpu": (64_000, 40), "cuda": (200_000, 400)}  # at most, and for each second of training
VAE_SHARE, TEACHER_SHARE, STUDENT_SHARE = 0.15, 0.55, 0.3  # of the time
_CROP = 32
_KL_WEIGHT = 1e-6
_BACKGROUND_WEIGHT = 0.3  # the background is most of an image and is learnt first
_CAPTION_DROPOUT = 0.12
_MAX_WEIGHT = 20.0
_WARMUP = 0.04  # of the time


def main(
    out: Annotated[Path, typer.Option(help="Where checkpoints and full-precision results go.")] = Path("runs/demo"),
    weights: Annotated[Path, typer.Option(help="Where the half-precision model goes.")] = WEIGHTS,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    minutes: Annotated[float | None, typer.Option(help="Time of training. By default 8 on a GPU, else 300.")] = None,
    start: Annotated[Path | None, typer.Option(help="A model to go on from, such as the embedded one.")] = None,
    settings: Annotated[Path, typer.Option(help="Of the student, as `perflow distill` takes them.")] = SETTINGS,
    student: Annotated[Path | None, typer.Option(help="A finished distillation to publish; trains nothing.")] = None,
) -> None:
    """Train every part of the demo model."""
    if student is not None:
        publish(student, weights)
        return
    place, base, run = torch.device(device), out / "base", out / "distillation"
    seconds = 60.0 * (minutes or (8 if place.type == "cuda" else 300))
    if not base.is_dir():
        most, each = IMAGES[place.type]
        images = render_images(min(most, round(each * seconds)), seed=1)
        parts, encoder, unet = out if start is None else start, build_caption_encoder(), build_unet()
        if start is not None:
            names = {"text_encoder": encoder.text_encoder, "text_encoder_2": encoder.text_encoder_2, "unet": unet}
            for name, model in names.items():
                model.load_state_dict(type(model).from_pretrained(start / name, dtype=torch.float32).state_dict())
        if not (parts / "vae").is_dir():
            train_vae(images, out / "vae", VAE_SHARE * seconds, place)
        vae = AutoencoderKL.from_pretrained(parts / "vae", dtype=torch.float32).to(place)
        latents = encode_images(vae, images) * vae.config.scaling_factor
        train_teacher(unet, encoder, latents, images, out, seconds=TEACHER_SHARE * seconds)
        save_base(vae, unet, encoder, base)
    if not (run / REPORT).exists():  # what is written last
        overrides = {"model.teacher": str(base), "output.directory": str(run), "output.resume": "latest"}
        if minutes is not None:
            overrides |= as_long_as(STUDENT_SHARE * seconds, settings, overrides, out)
        distill(load_config(settings, overrides))
    publish(run, weights, base)


def as_long_as(seconds: float, settings: Path, overrides: dict[str, str], out: Path) -> dict[str, str]:
    """The number of updates that a distillation makes in this time, measured once by a few of them."""
    known = out / "student_updates.json"
    if not known.exists():
        with TemporaryDirectory() as folder:
            few = {"optimizer.max_steps": "30", "output.log_every": "10", "output.validation_every": "null"}
            distill(
                load_config(settings, {**overrides, **few, "output.directory": folder, "output.workflow": "false"})
            )
            reading = json.loads((Path(folder) / METRICS).read_text(encoding="utf-8").splitlines()[-1])
        batch = load_config(settings, overrides).optimizer.batch_size
        known.write_text(json.dumps(max(30, round(seconds * reading["samples_per_second"] / batch))))
    return {"optimizer.max_steps": known.read_text()}


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
    draw: Callable[[int], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    *,
    seconds: float,
    lr: float,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
    ema_decay: float = 0.0,
    checkpoint: Path | None = None,
) -> None:
    """Trains what requires gradients with `loss(*draw(update))` for a time, in place and to its average.

    The learning rate follows the share of the time that is over: it rises, and falls to 0 by a cosine. The time that a
    `checkpoint` tells of counts too.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr, betas=(0.9, beta2), weight_decay=weight_decay, fused=True)
    ema = EMAModel(trained, decay=ema_decay, foreach=True)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "ema": ema}
    done, spent = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done, spent = state["done"], state["spent"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    began = time.monotonic() - spent
    with tqdm(desc=type(model).__name__, unit="update", initial=done) as bar:
        while (share := (time.monotonic() - began) / seconds) < 1.0:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, share / _WARMUP) * 0.5 * (1.0 + math.cos(math.pi * share))
            loss(*draw(done)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(trained)
            done += 1
            bar.update()
            if checkpoint is not None and done % CHECKPOINT_EVERY == 0:
                states = {name: part.state_dict() for name, part in parts.items()}
                with atomic_path(checkpoint) as temporary:
                    torch.save({**states, "done": done, "spent": time.monotonic() - began}, temporary)
    if not done:
        raise ValueError(f"{seconds:.0f} seconds are over already; remove {checkpoint}, or give more minutes.")
    ema.copy_to(trained)


def train_vae(images: RenderedImages, out: Path, seconds: float, device: torch.device, batch_size: int = 24) -> None:
    """Trains a VAE and saves it, its `scaling_factor` set to one over the latents' deviation.

    The loss is the absolute error, weighted towards the foreground, with a small KL term, on random crops, which teach
    the same at a quarter of the cost.
    """
    torch.manual_seed(0)
    generator, pixels = torch.Generator().manual_seed(0), images.pixels.to(device)
    vae = build_vae().to(device, memory_format=torch.channels_last)

    def draw(update: int) -> tuple[Tensor, ...]:
        whole = pixels[torch.randint(len(images), (batch_size,), generator=generator)] / 127.5 - 1.0
        top, left = torch.randint(IMAGE_SIZE - _CROP + 1, (2,), generator=generator).tolist()
        crop = whole[..., top : top + _CROP, left : left + _CROP].contiguous(memory_format=torch.channels_last)
        return crop, whole[..., :1, :1]

    def loss(crop: Tensor, background: Tensor) -> Tensor:
        posterior = vae.encode(crop).latent_dist
        error = (vae.decode(posterior.sample()).sample - crop).abs()
        foreground = ((crop - background).abs().amax(1, keepdim=True) > 0.1).float()
        weight = _BACKGROUND_WEIGHT + (1 - _BACKGROUND_WEIGHT) * foreground
        return (error * weight).mean() / weight.mean() + _KL_WEIGHT * posterior.kl().mean()

    fit(vae, draw, loss, seconds=seconds, lr=2e-3)
    vae.eval().register_to_config(scaling_factor=float(1.0 / encode_images(vae, images, limit=2048).std()))
    vae.save_pretrained(out)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: RenderedImages, *, limit: int | None = None) -> Tensor:
    """Posterior means of the first `limit` images, unscaled, on the VAE's device: (count, 4, 16, 16)."""
    chunks = tqdm(torch.arange(len(images))[:limit].split(128), desc="encode", unit="batch")
    return torch.cat([vae.encode(images.batch(chunk).to(vae.device)).latent_dist.mode() for chunk in chunks])


def train_teacher(
    unet: UNet2DConditionModel,
    encoder: CaptionEncoder,
    latents: Tensor,
    images: RenderedImages,
    out: Path,
    *,
    seconds: float,
    batch_size: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    """Trains the weights of `unet` and `encoder` that require gradients, in place, with a checkpoint in `out`.

    `latents` (count, 4, 16, 16) are the scaled ones of `images`, whose scenes give the captions; all runs on their
    device, on a GPU with 256 rows an update as CUDA graphs.
    """
    on_gpu = latents.device.type == "cuda"
    rows, model = batch_size or (256 if on_gpu else 32), nn.ModuleDict({"unet": unet, "encoder": encoder})
    model, sizes = model.to(latents.device), time_ids(rows).to(latents.device)
    unet.to(memory_format=torch.channels_last)
    if not on_gpu:
        unet.set_attn_processor(AttnProcessor())  # faster than SDPA in CPU training at these sizes

    def predict(noisy: Tensor, timesteps: Tensor, ids: Tensor, kept: Tensor, numbers: Tensor) -> Tensor:
        embeds, added = conditioning(encoder, ids, kept, sizes)
        return unet(noisy, timesteps, embeds, added_cond_kwargs=added).sample

    more: Any = {"batch_size": rows, "lr": lr, "seed": seed, "graphs": on_gpu}
    captions = encoder.tokenize(all_captions())
    checkpoint = out / "teacher_state.pt"
    fit_noise(model, predict, captions, latents, images, seconds=seconds, checkpoint=checkpoint, **more)


def conditioning(
    encoder: CaptionEncoder, ids: Tensor, kept: Tensor, sizes: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """SDXL's conditioning of token ids and `time_ids`.

    Embeddings are zeros where `kept` (batch,) is 0, as SDXL encodes the empty prompt.
    """
    embeds, pooled = encoder(ids)
    added = {"text_embeds": pooled * kept[:, None], "time_ids": sizes}
    return embeds * kept[:, None, None], added


def fit_noise(
    model: nn.Module,
    predict: Callable[..., Tensor],
    captions: Tensor,
    latents: Tensor,
    images: RenderedImages,
    *,
    seconds: float,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
    graphs: bool = False,
    checkpoint: Path | None = None,
) -> None:
    """Fits `model` until `predict` tells the noise in latents of captioned images, as `fit` does.

    `predict` gets noisy latents, timesteps, token ids, for each row 1.0 or 0.0 where its caption is to be dropped, and
    the rows' numbers among `images`. `captions` are the token ids of `all_captions()`. The error of the noise is
    weighted by min(1/abar, 20), which makes it an error of the image at high noise; plain weighting hardly teaches
    colour there, since an image of the wrong colour is a small error of the noise.
    """
    device = latents.device
    captions, alphas = captions.to(device), build_teacher_scheduler().alphas_cumprod.to(device)
    scenes = torch.tensor([scene.numbers() for scene in images.scenes], device=device)

    def draw(update: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + update)
        where: Any = {"generator": generator, "device": device}
        numbers = torch.randint(len(images), (batch_size,), **where)
        named = torch.rand(batch_size, len(ATTRIBUTES) - 1, **where) < 0.5
        ids = captions[caption_numbers(scenes[numbers], named)]
        kept = (torch.rand(batch_size, **where) >= _CAPTION_DROPOUT).float()
        timesteps = torch.randint(0, 500, (batch_size,), **where) + 500 * (torch.arange(batch_size, device=device) % 2)
        noise = torch.randn(batch_size, *latents.shape[1:], **where)
        return latents[numbers], noise, timesteps, ids, kept, numbers

    def loss(clean: Tensor, noise: Tensor, timesteps: Tensor, *given: Tensor) -> Tensor:
        alpha = alphas[timesteps].reshape(-1, 1, 1, 1)
        noisy = (alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise).contiguous(memory_format=torch.channels_last)
        prediction = predict(noisy, timesteps, *given)
        return ((prediction - noise).square() / alpha.clamp(min=1 / _MAX_WEIGHT)).mean()

    run = torch.compile(loss, mode="reduce-overhead") if graphs else loss
    more: Any = {"beta2": 0.99, "weight_decay": 1e-2, "ema_decay": 0.999, "checkpoint": checkpoint}
    fit(model, draw, run, seconds=seconds, lr=lr, **more)


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    typer.run(main)
