"""What a pipeline must hold for a request: models, loaded and of one type, and blocks that take what is given."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.utils import logging

from ..inputs import OUTPUT_TYPES
from .request import EMBEDDING_NAMES, PROMPT_NAMES

logger = logging.get_logger(__name__)

PICTURE_NAMES = ("image", "mask_image", "control_image", "control_mode", "ip_adapter_image")
TASK_NAMES = (*PICTURE_NAMES, "image_latents", "mask", "ip_adapter_embeds", "strength", "denoising_start")

STAGES = {
    "text_encoder": ("prompt_embeds", PROMPT_NAMES),
    "ip_adapter": ("ip_adapter_embeds", ("ip_adapter_image",)),
    "vae_encoder": ("image_latents", ("image", "mask_image", "padding_mask_crop")),
}
"""The blocks of a preset that encode: what each makes, and of what."""

OPTIONAL_COMPONENTS: dict[str, Callable[[Any, Container[str]], bool]] = {
    "scheduler": lambda request, blocks: False,  # the window set-up makes one
    "guider": lambda request, blocks: False,  # a check of its own says more
    "vae": lambda request, blocks: (
        ("decode" in blocks and request.output_type != "latent")
        or ("vae_encoder" in blocks and request.image is not None)
    ),
    "text_encoder_2": lambda request, blocks: request.prompt is not None,
    "tokenizer_2": lambda request, blocks: request.prompt is not None,
    "controlnet": lambda request, blocks: request.control_image is not None,
    "image_encoder": lambda request, blocks: request.ip_adapter_image is not None,
    "feature_extractor": lambda request, blocks: request.ip_adapter_image is not None,
}
"""Components that a pipeline may lack, and for which requests to which blocks it may not."""


KNOWN_COMPONENTS = {"unet", "text_encoder", "tokenizer", *OPTIONAL_COMPONENTS}
"""What this package knows the need of; blocks of users may declare others, and may do without them."""


def forget_done_stages(request: Any, blocks: Container[str]) -> None:
    """Takes from the request what another pipeline encoded already: a state that is handed on holds both.

    Args:
        request: the block state of `PeRFlowCheckInputsStep`, changed in place.
        blocks: the names of the pipeline's blocks.
    """
    for stage, (made, sources) in STAGES.items():
        if stage not in blocks and getattr(request, made) is not None:
            for name in sources:
                setattr(request, name, None)


def check_loaded(loaded: Mapping[str, Any], request: Any, required: Sequence[str], blocks: Container[str]) -> None:
    """
    Raises:
        ValueError: a component or an input that the workflow needs is missing, or an unknown `output_type`.
    """
    if request.output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type={request.output_type!r} is unknown; pass one of {', '.join(OUTPUT_TYPES)}.")
    for name in PICTURE_NAMES:
        if name in required and getattr(request, name) is None:
            raise ValueError(f"{name} is missing, and this workflow needs it; pass {name}=.")
    missing = {name for name, component in loaded.items() if component is None and name in KNOWN_COMPONENTS}
    missing -= {
        name for name in missing & OPTIONAL_COMPONENTS.keys() if not OPTIONAL_COMPONENTS[name](request, blocks)
    }
    if request.prompt is None or ({"text_encoder", "tokenizer"} <= missing and _is_refiner(loaded)):
        missing -= {"text_encoder", "tokenizer"}
    if missing:
        names = " and ".join(sorted(missing))
        raise ValueError(f"{names} not loaded; call pipe.load_components() and look at its warnings.")


def check_dtypes(loaded: Mapping[str, Any], request: Any, blocks: Container[str]) -> None:
    """
    Raises:
        ValueError: a model or a given tensor is of another type than the UNet, where the two meet.
    """
    unet = loaded["unet"]
    device_type = unet.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):  # "meta": offloaded layer by layer
        return
    meets = {
        "text_encoder_2": request.prompt is not None,
        "controlnet": request.control_image is not None,
        "vae": OPTIONAL_COMPONENTS["vae"](request, blocks),
    }
    for name in (name for name, needed in meets.items() if needed and loaded.get(name) is not None):
        if loaded[name].dtype != unet.dtype:
            raise ValueError(
                f"the {name} is {loaded[name].dtype}, the UNet {unet.dtype}; load all components with one type: "
                f"pipe.load_components(dtype={unet.dtype})."
            )
    for name in (*EMBEDDING_NAMES, "latents"):
        tensor = getattr(request, name)
        if tensor is not None and tensor.dtype != unet.dtype:
            raise ValueError(f"{name} are {tensor.dtype}, the UNet {unet.dtype}; pass {name}.to({unet.dtype}).")


def warn_of_idle_inputs(request: Any, others: Sequence[ModularPipelineBlocks]) -> None:
    """Logs what is given for a task but taken by none of the pipeline's other blocks, as diffusers does elsewhere."""
    given = [name for name in TASK_NAMES if getattr(request, name) is not None]
    taken = {name for block in others for name in block.input_names} if given else set()
    for name in given:
        if name not in taken:
            logger.warning("%s is given, but no block of this pipeline takes it; it is ignored.", name)


def _is_refiner(loaded: Mapping[str, Any]) -> bool:
    """SDXL's refiner has the second text encoder alone, so its UNet is as wide as that."""
    unet, encoder = loaded["unet"], loaded.get("text_encoder_2")
    return unet is not None and encoder is not None and (unet.config.cross_attention_dim == encoder.config.hidden_size)
