"""SDXL's architecture with random weights, at full size and smaller: what is timed does not depend on the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, ModularPipeline, UNet2DConditionModel
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from perflow_blocks.blocks.recombine import find_loops
from perflow_blocks.demo.models import load_tokenizer

MAX_TOKENS = 77
_TIME_IDS = 6
_VOCABULARY = 49_408


@dataclass(frozen=True, kw_only=True)
class Size:
    """The numbers that differ between SDXL and smaller models of its architecture.

    Attributes:
        latents: height and width of the latents.
        channels: of the UNet's three levels; the first has no attention.
        layers: residual blocks at each level, of UNet and autoencoder.
        transformers: transformer layers per attention block at each level.
        head_dim: channels of an attention head.
        time_embedding: channels of each of the six embedded time ids.
        text: hidden sizes of the two text encoders; the second is the pooled embedding's as well.
        text_layers: layers of the two text encoders.
        vae_channels: of the autoencoder's four levels; each but the last halves height and width.
        groups: of the group norms.
    """

    latents: int
    channels: tuple[int, int, int]
    layers: int
    transformers: tuple[int, int, int]
    head_dim: int
    time_embedding: int
    text: tuple[int, int]
    text_layers: tuple[int, int]
    vae_channels: tuple[int, int, int, int]
    groups: int

    @property
    def pixels(self) -> int:
        return 8 * self.latents


SDXL = Size(
    latents=128,
    channels=(320, 640, 1280),
    layers=2,
    transformers=(1, 2, 10),
    head_dim=64,
    time_embedding=256,
    text=(768, 1280),
    text_layers=(12, 32),
    vae_channels=(128, 256, 512, 512),
    groups=32,
)
"""https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, the config.json of each part."""

MEDIUM = replace(
    SDXL,
    latents=64,
    channels=(96, 192, 384),
    transformers=(1, 1, 2),
    time_embedding=64,
    text=(256, 256),
    text_layers=(2, 2),
)
"""A call with two rows takes about half a second on two CPU cores."""

DEEP = replace(
    SDXL,
    latents=8,
    channels=(16, 32, 64),
    head_dim=16,
    time_embedding=8,
    text=(16, 32),
    vae_channels=(8, 16, 32, 32),
    groups=8,
)
"""As many modules as SDXL has, 1,930 in the UNet, and a few channels each: what is left is the work of the host."""

TINY = replace(DEEP, latents=16, layers=1, transformers=(1, 1, 1), text_layers=(2, 2))
"""For dry runs."""


class FreeUNet(UNet2DConditionModel):
    """A UNet whose call costs next to nothing: it returns its input."""

    def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (sample,)


def build_unet(
    size: Size,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: Any = UNet2DConditionModel,
) -> Any:
    """SDXL's UNet in that size: (batch, 4, latents, latents) to the same shape."""
    return _build(
        lambda: kind(
            sample_size=size.latents,
            block_out_channels=size.channels,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=size.layers,
            transformer_layers_per_block=size.transformers,
            # As in SDXL's own file this is the number of heads, whatever its name says.
            attention_head_dim=tuple(max(1, width // size.head_dim) for width in size.channels),
            use_linear_projection=True,
            cross_attention_dim=sum(size.text),
            addition_embed_type="text_time",
            addition_time_embed_dim=size.time_embedding,
            projection_class_embeddings_input_dim=size.text[1] + _TIME_IDS * size.time_embedding,
            norm_num_groups=size.groups,
        ),
        device,
        dtype,
    )


def build_components(
    size: Size, device: torch.device | str, dtype: torch.dtype, unet: Any = UNet2DConditionModel
) -> dict[str, Any]:
    """All models and tokenizers of a text-to-image pipeline; `unet` is the UNet's class."""
    tokenizer = load_tokenizer()  # its words are the demo's; texts are padded to SDXL's length all the same
    tokenizer.model_max_length = MAX_TOKENS
    return {
        "vae": _build(lambda: _vae(size), device, dtype),
        "text_encoder": _build(lambda: CLIPTextModel(_text_config(size, 0, tokenizer)), device, dtype),
        "text_encoder_2": _build(lambda: CLIPTextModelWithProjection(_text_config(size, 1, tokenizer)), device, dtype),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "unet": build_unet(size, device, dtype, unet),
    }


def random_embeddings(size: Size, device: torch.device | str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One prompt's embeddings and its negative prompt's, by the names that pipelines of both kinds take."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"prompt_embeds": (1, MAX_TOKENS, sum(size.text)), "pooled_prompt_embeds": (1, size.text[1])}
    return {
        prefix + name: torch.randn(shape, generator=generator).to(device, dtype)
        for prefix in ("", "negative_")
        for name, shape in shapes.items()
    }


def random_latents(size: Size, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Starting noise (1, 4, latents, latents)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(1, 4, size.latents, size.latents, generator=generator).to(device, dtype)


def make_pipeline(blocks: ModularPipelineBlocks, components: dict[str, Any]) -> Any:
    """The blocks' own pipeline with those of the components that it has; its loops show no progress bars."""
    for loop in find_loops(blocks):
        loop.set_progress_bar_config(disable=True)
    pipe: ModularPipeline = blocks.init_pipeline()
    # update_components would refuse an image processor that another pipeline made from its configuration.
    pipe.register_components(**{name: part for name, part in components.items() if name in pipe.components})
    return pipe


def _build(make: Callable[[], Any], device: torch.device | str, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model: nn.Module = make()
    return model.to(dtype).eval().requires_grad_(False)


def _vae(size: Size) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=size.pixels,
        block_out_channels=size.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=size.layers,
        latent_channels=4,
        norm_num_groups=size.groups,
        scaling_factor=0.13025,
    )


def _text_config(size: Size, index: int, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    width = size.text[index]
    return CLIPTextConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=size.text_layers[index],
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=MAX_TOKENS,
        projection_dim=size.text[1],
        hidden_act="quick_gelu" if index == 0 else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
