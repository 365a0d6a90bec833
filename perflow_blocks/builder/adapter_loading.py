"""LoRAs and IP-Adapters go into the models of a pipeline, all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import CLIPImageProcessor

from ..blocks.settings import complaint
from .plan import BuildPlan
from .settings import IPAdapterChoice, LoraChoice
from .sharing import LORA_MODELS, adapters_of


def add_adapters(pipe: Any, plan: BuildPlan) -> None:
    """Adds what the plan names, unless the models have it from another builder.

    Raises:
        ValueError: one cannot be loaded.
    """
    settings, adapter = plan.settings, plan.settings.ip_adapter
    if adapter is not None and "feature_extractor" in plan.parts and "feature_extractor" not in settings.components:
        size = pipe.image_encoder.config.image_size
        pipe.register_components(feature_extractor=CLIPImageProcessor(size=size, crop_size=size))
    if "unet" in plan.shared:
        return
    for lora in settings.loras:
        with _told(f"with_lora({lora.location!r})"):
            _load_lora(pipe, lora)
    if settings.loras:
        with _told("with_lora"):
            pipe.set_adapters([lora.adapter_name for lora in settings.loras], [x.weight for x in settings.loras])
    if adapter is not None:
        with _told(f"with_ip_adapter({adapter.location!r})"):
            _load_ip_adapter(pipe, adapter)


def _load_lora(pipe: Any, lora: LoraChoice) -> None:
    extra = {} if lora.weight_name is None else {"weight_name": lora.weight_name}
    pipe.load_lora_weights(lora.location, adapter_name=lora.adapter_name, **extra)


def _load_ip_adapter(pipe: Any, adapter: IPAdapterChoice) -> None:
    pipe.load_ip_adapter(adapter.location, subfolder=adapter.subfolder, weight_name=list(adapter.weight_names))
    pipe.set_ip_adapter_scale(adapter.scale)


@contextmanager
def _told(step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a library's, of any kind
        raise ValueError(complaint("built", [f"{step}: {error}"])) from error


@contextmanager
def no_adapters_where_it_fails(pipe: Any) -> Iterator[None]:
    """Takes the adapters out that were added within, and only those, if it ends with an error."""
    models = {name: model for name in LORA_MODELS if (model := getattr(pipe, name, None)) is not None}
    held = {name: adapters_of(model).loras for name, model in models.items()}
    restore_ip_adapter = _ip_adapter_restorer(models["unet"]) if "unet" in models else None
    try:
        yield
    except BaseException:
        added = {name: adapters_of(model).loras - held[name] for name, model in models.items()}
        if any(added.values()) and not any(held.values()):
            pipe.unload_lora_weights()
        elif any(added.values()):  # beside those of a model that was given, which stay
            pipe.delete_adapters(sorted(set().union(*added.values())))
        if restore_ip_adapter is not None:
            restore_ip_adapter()
        raise


def _ip_adapter_restorer(unet: Any) -> Callable[[], None]:
    """What brings back the attention processors and the projection of pictures that the UNet has now.

    `unload_ip_adapter` would take out those of an IP-Adapter that came with a given UNet.
    """
    processors, projection = dict(unet.attn_processors), unet.encoder_hid_proj
    kind = unet.config.encoder_hid_dim_type

    def restore() -> None:
        if any(found is not processors.get(name) for name, found in unet.attn_processors.items()):
            unet.set_attn_processor(dict(processors))
        unet.encoder_hid_proj = projection
        if unet.config.encoder_hid_dim_type != kind:
            unet.config.encoder_hid_dim_type = kind

    return restore
