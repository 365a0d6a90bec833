"""For tests, of this project's blocks and of yours: tiny components that need no download, and a contract check."""

from .contract import BlockContractError as BlockContractError
from .contract import check_block as check_block
from .tiny import load_tiny_ip_adapter as load_tiny_ip_adapter
from .tiny import tiny_controlnet as tiny_controlnet
from .tiny import tiny_controlnet_union as tiny_controlnet_union
from .tiny import tiny_feature_extractor as tiny_feature_extractor
from .tiny import tiny_image as tiny_image
from .tiny import tiny_image_encoder as tiny_image_encoder
from .tiny import tiny_inpainting_unet as tiny_inpainting_unet
from .tiny import tiny_inputs as tiny_inputs
from .tiny import tiny_mask as tiny_mask
from .tiny import tiny_sd_components as tiny_sd_components
from .tiny import tiny_sd_unet as tiny_sd_unet
from .tiny import tiny_sdxl_components as tiny_sdxl_components
from .tiny import tiny_sdxl_unet as tiny_sdxl_unet
from .tiny import tiny_tokenizer as tiny_tokenizer
from .tiny import tiny_unconditional_unet as tiny_unconditional_unet
from .tiny import tiny_vae as tiny_vae
