"""What a builder was told, and nothing that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

OffloadMode = Literal["auto", "group"]
"""How models are kept off the device while they do not run."""

OFFLOAD_MODES: tuple[str, ...] = get_args(OffloadMode)

DtypeLike = torch.dtype | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A pipeline in diffusers' layout.

    Attributes:
        location: directory, or repository of the Hub.
        revision: of the repository; None for its main branch. For what it holds itself.
        variant: of the weight files, such as "fp16"; None for those without one. For what it holds itself.
    """

    location: str
    revision: str | None = None
    variant: str | None = None


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """A checkpoint of UNet, VAE and text encoders in one file.

    Attributes:
        path: the .safetensors file.
        config: directory or repository with the components' configurations, tokenizers and scheduler; None to let
            diffusers infer a repository of the Hub from the weights.
    """

    path: str
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class ComponentChoice:
    """What stands for one component.

    Attributes:
        value: the object, a ComponentSpec, a directory or repository to load it from, or None to leave it out.
        freeze: whether its weights take no gradients.
        loading: fields of the ComponentSpec for a directory or repository: subfolder, variant, revision.
    """

    value: Any
    freeze: bool = False
    loading: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DeltaChoice:
    """
    Attributes:
        path: file or folder of delta weights.
        scale: the factor to merge them with.
        variant: which of several files in a folder; None for those without one.
    """

    path: str
    scale: float = 1.0
    variant: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """
    Attributes:
        adapter_name: what peft calls it.
        location: file, directory or repository.
        weight: its factor.
        weight_name: the file in a directory or repository; None for the usual one.
    """

    adapter_name: str
    location: str
    weight: float = 1.0
    weight_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class IPAdapterChoice:
    """As diffusers' `load_ip_adapter` takes it.

    Attributes:
        location: directory or repository.
        subfolder: of the weights.
        weight_names: one file for each adapter.
        scale: for all of them.
        image_encoder_folder: where the image encoder is, below `subfolder` if it has no slash; None where it is given.
    """

    location: str
    subfolder: str
    weight_names: tuple[str, ...]
    scale: float = 1.0
    image_encoder_folder: str | None = "image_encoder"


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """A block to insert, and the block it stands next to; one of `before` and `after`."""

    block: Any
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class BuilderSettings:
    """All that the steps of a builder were given. None, or empty, where a step was not taken.

    Attributes:
        repository, single_file: where components come from; at most one of the two.
        dtype: of all models; "auto" for that of the given models, else the one that suits the device.
        components: by name, what takes the place of the source's.
        delta, loras, ip_adapter: weights that are added.
        guider: the guider.
        guidance: guidance_scale, start and stop of a ClassifierFreeGuidance.
        attention: the attention plan, or an AttentionConfig.
        blocks, workflow, insertions: the blocks, the workflow to reduce them to, and blocks to insert, by name.
        config: configuration values of the pipeline.
        compile: arguments of `compile_loops`.
        prompt_cache: how many requests to keep the embeddings of.
        offload, device: where models are.
    """

    repository: Repository | None = None
    single_file: SingleFile | None = None
    dtype: DtypeLike = "auto"
    components: Mapping[str, ComponentChoice] = field(default_factory=dict)
    delta: DeltaChoice | None = None
    loras: tuple[LoraChoice, ...] = ()
    ip_adapter: IPAdapterChoice | None = None
    guider: Any = None
    guidance: Mapping[str, float] | None = None
    attention: Any = None
    blocks: Any = None
    workflow: str | None = None
    insertions: Mapping[str, Insertion] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    compile: Mapping[str, Any] | None = None
    prompt_cache: int | None = None
    offload: str | None = None
    device: str | int | torch.device | None = None

    @property
    def config_values(self) -> dict[str, Any]:
        """`config`, and what `delta` says in such values."""
        if self.delta is None:
            return dict(self.config)
        delta = {"delta": self.delta.path, "delta_variant": self.delta.variant, "delta_scale": self.delta.scale}
        return {**self.config, **delta}
