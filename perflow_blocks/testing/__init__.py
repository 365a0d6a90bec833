"""For tests, of this project's blocks and of yours: tiny components that need no download, and a contract check."""

from .contract import BlockContractError, check_block
from .inputs import tiny_inputs
from .tiny import (
    load_tiny_ip_adapter,
    tiny_controlnet,
    tiny_controlnet_union,
    tiny_feature_extractor,
    tiny_image_encoder,
    tiny_inpainting_unet,
    tiny_mask,
    tiny_picture,
    tiny_sd_components,
    tiny_sd_unet,
    tiny_sdxl_components,
    tiny_sdxl_unet,
    tiny_tokenizer,
    tiny_vae,
)

__all__ = [
    "BlockContractError",
    "check_block",
    "load_tiny_ip_adapter",
    "tiny_controlnet",
    "tiny_controlnet_union",
    "tiny_feature_extractor",
    "tiny_image_encoder",
    "tiny_inpainting_unet",
    "tiny_inputs",
    "tiny_mask",
    "tiny_picture",
    "tiny_sd_components",
    "tiny_sd_unet",
    "tiny_sdxl_components",
    "tiny_sdxl_unet",
    "tiny_tokenizer",
    "tiny_vae",
]
