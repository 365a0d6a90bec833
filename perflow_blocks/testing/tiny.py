"""Tiny random diffusion components that are made in well under a second: the right shapes, meaningless images.

Every function is deterministic (fixed seeds, the caller's random state is left alone) and makes new objects at each
call, so that a test may change what it gets. Images are `IMAGE_SIZE` pixels wide and high; latents are half of that.
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..schedulers import PeRFlowScheduler

IMAGE_SIZE = 32
LATENT_SIZE = 16
MAX_TOKENS = 16
TEXT_WIDTH = 16
"""Hidden size of each text encoder, and the pooled size of the second."""
TIME_ID_WIDTH = 8
IMAGE_WIDTH = 24
"""Size of the image encoder's embeddings, which IP-Adapters take."""
CONTROL_TYPES = 6
"""Kinds of image that a ControlNet-Union knows."""

NUM_STEPS = 4
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

_LAYOUT: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": 1,
    "norm_num_groups": 8,
}
"""What a UNet and the ControlNets beside it share."""

_UNET = {
    **_LAYOUT,
    "sample_size": LATENT_SIZE,
    "out_channels": 4,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_SDXL_CONDITIONING: dict[str, Any] = {
    "cross_attention_dim": 2 * TEXT_WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_ID_WIDTH,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * TIME_ID_WIDTH,
    "use_linear_projection": True,
}


def _vocab() -> dict[str, int]:
    """Special tokens, then every lower-case letter, digit and punctuation mark, alone and as the end of a word."""
    characters = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{c}</w>" for c in characters)]
    return {token: index for index, token in enumerate(tokens)}


def _made(seed: int, make: Any, *arguments: Any, **settings: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(*arguments, **settings).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that splits text into characters; no file is read."""
    return CLIPTokenizer(vocab=_vocab(), merges=[], model_max_length=MAX_TOKENS)


def tiny_text_config() -> CLIPTextConfig:
    vocab = _vocab()
    return CLIPTextConfig(
        vocab_size=len(vocab),
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        pad_token_id=vocab["<|endoftext|>"],
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=MAX_TOKENS,
    )


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """Three channels to four latent channels at half the size."""
    return _made(
        seed,
        AutoencoderKL,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def tiny_sdxl_unet(seed: int = 0) -> UNet2DConditionModel:
    """SDXL's conditioning (`text_time`, two text encoders) on two small levels."""
    return _made(seed, UNet2DConditionModel, **_UNET, **_SDXL_CONDITIONING)


def tiny_inpainting_unet(seed: int = 0) -> UNet2DConditionModel:
    """The SDXL UNet with nine input channels: latents, mask, latents of the masked image."""
    return _made(seed, UNet2DConditionModel, in_channels=9, **_UNET, **_SDXL_CONDITIONING)


def tiny_sd_unet(seed: int = 0, in_channels: int = 4) -> UNet2DConditionModel:
    """Stable Diffusion 1.5's conditioning on two small levels; with 9 channels for inpainting."""
    return _made(seed, UNet2DConditionModel, cross_attention_dim=TEXT_WIDTH, in_channels=in_channels, **_UNET)


def tiny_unconditional_unet(seed: int = 0) -> UNet2DModel:
    """An unconditional model of RGB pixels, `LATENT_SIZE` wide and high, on two small levels."""
    size = {"sample_size": LATENT_SIZE, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return _made(seed, UNet2DModel, **size, **blocks)


def tiny_sdxl_components(scheduler: Any = None) -> dict[str, Any]:
    """What `StableDiffusionXLPipeline(**components)` and its img2img form need; the default scheduler is Euler."""
    config = tiny_text_config()
    encoders = _made(1, lambda: nn.ModuleList([CLIPTextModel(config), CLIPTextModelWithProjection(config)]))
    return {
        "vae": tiny_vae(),
        "text_encoder": encoders[0],
        "text_encoder_2": encoders[1],
        "tokenizer": tiny_tokenizer(),
        "tokenizer_2": tiny_tokenizer(),
        "unet": tiny_sdxl_unet(),
        "scheduler": scheduler or EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
    }


def tiny_sd_components(scheduler: Any = None) -> dict[str, Any]:
    """What `StableDiffusionPipeline(**components)` and its img2img form need; the default scheduler is DDIM."""
    return {
        "vae": tiny_vae(),
        "text_encoder": _made(1, CLIPTextModel, tiny_text_config()),
        "tokenizer": tiny_tokenizer(),
        "unet": tiny_sd_unet(),
        "scheduler": scheduler or DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def tiny_controlnet(seed: int = 0) -> ControlNetModel:
    """A ControlNet for `tiny_sdxl_unet` whose output is not zero, as that of a trained one."""
    return _made(seed, _controlnet, ControlNetModel)


def tiny_sd_controlnet(seed: int = 0) -> ControlNetModel:
    """The same for `tiny_sd_unet`."""
    changes = {"addition_embed_type": None, "cross_attention_dim": TEXT_WIDTH, "use_linear_projection": False}
    return _made(seed, _controlnet, ControlNetModel, **changes)


def tiny_controlnet_union(seed: int = 0) -> ControlNetUnionModel:
    """A ControlNet-Union for `tiny_sdxl_unet` that knows `CONTROL_TYPES` kinds; its output is not zero."""
    union = {"num_control_type": CONTROL_TYPES, "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return _made(seed, _controlnet, ControlNetUnionModel, **union)


def _controlnet(kind: Any, **settings: Any) -> Any:
    """A ControlNet that tells images apart; the outer layers of a fresh one are zero."""
    settings = {**_LAYOUT, **_SDXL_CONDITIONING, "conditioning_embedding_out_channels": (8, 16), **settings}
    controlnet = kind(**settings)
    for layer in controlnet.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not layer.weight.any():
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    # With torch's own initialisation the layers that see the image would let little of it through.
    for layer in controlnet.controlnet_cond_embedding.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return controlnet


def tiny_image_encoder(seed: int = 0) -> CLIPVisionModelWithProjection:
    """Images of `IMAGE_SIZE` to embeddings (batch, IMAGE_WIDTH), for IP-Adapters."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        projection_dim=IMAGE_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return _made(seed, CLIPVisionModelWithProjection, config)


def tiny_feature_extractor() -> CLIPImageProcessor:
    """What brings images to the size of `tiny_image_encoder`."""
    return CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)


def load_tiny_ip_adapter(pipe: Any, count: int = 1, seed: int = 0) -> None:
    """Loads IP-Adapters of random weights into the pipeline's UNet, as `pipe.load_ip_adapter` loads their files.

    A pipeline with an `image_encoder` that is not set gets the tiny one, and its `feature_extractor`.

    Args:
        pipe: a modular pipeline with a tiny UNet.
        count: number of adapters, at least 1.
        seed: of the first adapter; each further one has the next.
    """
    if "image_encoder" in pipe.null_component_names:
        # update_components takes no image processor in place of one that was made from its configuration.
        pipe.register_components(image_encoder=tiny_image_encoder(), feature_extractor=tiny_feature_extractor())
    adapters = [ip_adapter_weights(pipe.unet, seed + index) for index in range(count)]
    pipe.load_ip_adapter(adapters, subfolder="", weight_name=[""] * count)


def ip_adapter_weights(
    unet: UNet2DConditionModel, seed: int, image_width: int = IMAGE_WIDTH
) -> dict[str, dict[str, Tensor]]:
    """Random weights as an IP-Adapter's file holds them: the image projection, keys and values of cross-attention.

    `image_width` is that of the image encoder's embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    width, tokens, attentions = unet.config.cross_attention_dim, 4, dict[str, Tensor]()

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    # Files number all attention layers; the odd ones are those that see the text.
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            attentions |= {f"{index}.to_{kind}_ip.weight": matrix(inner, width) for kind in "kv"}
    projection = {"proj.weight": matrix(tokens * width, image_width), "proj.bias": matrix(1, tokens * width)[0]}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": projection, "ip_adapter": attentions}


def tiny_image(seed: int = 0, size: int | tuple[int, int] = IMAGE_SIZE) -> Image.Image:
    """A smooth RGB image of random colours; `size` is (width, height) in pixels, or one number for both."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((size, size) if isinstance(size, int) else size, Image.Resampling.BICUBIC)


def tiny_mask(size: int | tuple[int, int] = IMAGE_SIZE) -> Image.Image:
    """A mask for inpainting: white, to be repainted, are the right half's lower three quarters; `size` as above."""
    width, height = (size, size) if isinstance(size, int) else size
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, height // 4, width, height))
    return mask


def tiny_inputs() -> dict[str, Any]:
    """A value for each known name, newly made: four steps over four windows, each of which starts a window."""
    scheduler = PeRFlowScheduler(**BETAS)
    scheduler.set_timesteps(NUM_STEPS)
    plan = scheduler.plan
    latents, pixels = (1, 4, LATENT_SIZE, LATENT_SIZE), (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    mask = torch.zeros(1, 1, *latents[2:])
    mask[..., LATENT_SIZE // 4 :, LATENT_SIZE // 2 :] = 1.0  # as in tiny_mask
    time_ids = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]])
    return {
        "prompt": "a red star",
        "prompt_embeds": _noise(1, MAX_TOKENS, 2 * TEXT_WIDTH, seed=1),
        "negative_prompt_embeds": _noise(1, MAX_TOKENS, 2 * TEXT_WIDTH, seed=2),
        "pooled_prompt_embeds": _noise(1, TEXT_WIDTH, seed=3),
        "negative_pooled_prompt_embeds": _noise(1, TEXT_WIDTH, seed=4),
        "add_time_ids": time_ids.float(),
        "negative_add_time_ids": time_ids.float(),
        "batch_size": 1,
        "num_images_per_prompt": 1,
        "dtype": torch.float32,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pil",
        "timesteps": scheduler.timesteps,
        "num_inference_steps": NUM_STEPS,
        "step_plan": plan,
        "step_coefficients": plan.coefficients(),
        "noise_coefficients": torch.tensor([*((a**0.5, (1.0 - a) ** 0.5) for a in plan.alpha_start), (1.0, 0.0)]),
        "strength": 1.0,
        "latents": _noise(*latents, seed=5),
        "noise_pred": _noise(*latents, seed=6),
        "noise": _noise(*latents, seed=7),
        "image_latents": _noise(*latents, seed=8),
        "masked_image_latents": _noise(*latents, seed=9),
        "mask": mask,
        "inpaint_conditioning": torch.cat([mask, _noise(*latents, seed=9)], dim=1),
        "height": IMAGE_SIZE,
        "width": IMAGE_SIZE,
        "image": tiny_image(0),
        "mask_image": tiny_mask(),
        "processed_image": _noise(*pixels, seed=10).tanh(),
        "images": [tiny_image(1)],
        "ip_adapter_image": tiny_image(2),
        "ip_adapter_embeds": [_noise(1, 1, IMAGE_WIDTH, seed=11)],
        "negative_ip_adapter_embeds": [torch.zeros(1, 1, IMAGE_WIDTH)],
        "control_image": tiny_image(3),
        "control_mode": [0],
        "controlnet_cond": _noise(*pixels, seed=12).sigmoid(),
        "conditioning_scale": 1.0,
        "controlnet_keep": [1.0] * NUM_STEPS,
        "guess_mode": False,
        "control_type": torch.eye(CONTROL_TYPES)[:1],
        "control_type_idx": [0],
    }


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
