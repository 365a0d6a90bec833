"""Assembling a pipeline in one chain of steps: `PeRFlowPipelineBuilder`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import torch
from diffusers import (
    ClassifierFreeGuidance,
    ComponentsManager,
    ModelMixin,
    MultiControlNetModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from diffusers.quantizers import DiffusersAutoQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils.torch_utils import get_device, unwrap_module
from safetensors import SafetensorError, safe_open
from torch import nn

from .attention.config import AttentionConfig, PlanLike
from .blocks.block_source import SD_PRESET, SDXL_PRESET, has_own_blocks, make_preset, preset_for
from .blocks.encode import DEFAULT_MAX_ENTRIES, PeRFlowAutoTextEncoderStep, PromptCacheStep
from .blocks.guiders import check_guider
from .blocks.merge_delta import PeRFlowMergeDeltaStep, delta_path
from .blocks.pipeline import PeRFlowModularPipeline, PeRFlowSDModularPipeline, offload_in_groups, put_components
from .blocks.recombine import compile_loops, insert_loop_block
from .blocks.saving import DELTA_VALUES, Problems
from .blocks.sd import PeRFlowSDPromptCacheStep, PeRFlowSDTextEncoderStep
from .delta.apply import require_architecture
from .delta.files import open_weights, read_recipe

PathLike = str | os.PathLike[str]
Dtype = torch.dtype | Literal["auto"]
Blocks: TypeAlias = ModularPipelineBlocks | type[ModularPipelineBlocks]

LORA_MODELS = ("unet", "text_encoder", "text_encoder_2")  # diffusers loads a LoRA into all of them
REQUIRED = (*LORA_MODELS, "vae", "tokenizer", "tokenizer_2")  # of those that the blocks take
IN_FILE = (*REQUIRED, "scheduler")  # what an original checkpoint and its configuration give
MARK = "_perflow_built"  # the attribute of a component that a builder put into a pipeline: its `_state` then


_PROMPT_CACHES: dict[Any, Any] = {
    PeRFlowAutoTextEncoderStep: PromptCacheStep,
    PeRFlowSDTextEncoderStep: PeRFlowSDPromptCacheStep,
}


class _Source(NamedTuple):
    location: str
    revision: str | None = None
    variant: str | None = None
    is_file: bool = False
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Settings:
    source: _Source | None = None
    dtype: Dtype = "auto"
    components: Mapping[str, Any] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    loras: Mapping[str, tuple[str, str | None, float]] = field(default_factory=dict)
    ip_adapter: tuple[str, str, tuple[str, ...], float] | None = None
    quantization: QuantizationConfigMixin | None = None
    blocks: Any = None
    workflow: str | None = None
    insertions: Mapping[str, tuple[Any, str | None, str | None]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    compile: Mapping[str, Any] | None = None
    prompt_cache: int | None = None
    offload: str | None = None
    device: str | int | torch.device | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class PeRFlowPipelineBuilder:
    """Assembles a PeRFlow pipeline in one chain of steps.

    Each step returns a new builder and leaves the old one unchanged. Of steps that set the same thing the last one
    counts; otherwise only the order of inserted blocks matters. Nothing is loaded before `build`.

    Builders with one `ComponentsManager`, which a step hands on, share what they load: weights of the same source,
    type, device, delta, quantization, LoRAs and IP-Adapter are loaded once. If you change a shared component outside a
    builder, all of its pipelines change; if you change its type or adapters, later pipelines do not share it.

    Example:
        >>> builder = PeRFlowPipelineBuilder().from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe = builder.with_delta("perflow_delta.safetensors").on("cuda").build()

    Args:
        components_manager, collection: what holds the components; by default a new manager, and no collection in it.
    """

    components_manager: ComponentsManager = field(default_factory=ComponentsManager)
    collection: str | None = None
    settings: _Settings = field(default_factory=_Settings, repr=False)

    def from_pretrained(
        self, location: PathLike, *, revision: str | None = None, variant: str | None = None, dtype: Dtype = "auto"
    ) -> Self:
        """Takes the components of a directory or repository in diffusers' layout, plain or modular.

        Args:
            location: directory or repository of the Hub. Code in it is not run; if it has blocks of its own, pass them
                to `with_blocks`.
            revision, variant: of the repository and of its weight files ("fp16"), not of others that its index names.
            dtype: of all models. "auto": that of a UNet, ControlNet or text encoder that you give; else bfloat16 where
                the device computes in it, float16 on other accelerators, float32 on the CPU.
        """
        return self._with(source=_Source(_text(location), revision, variant), dtype=dtype)

    def from_single_file(self, path: PathLike, *, config: PathLike | None = None, dtype: Dtype = "auto") -> Self:
        """Takes the models of an original checkpoint, the usual form of fine-tunes.

        Args:
            path: a .safetensors file with the names of original checkpoints.
            config: directory or repository with a saved pipeline of the same family, for configurations, tokenizers
                and scheduler. With a directory nothing is downloaded. By default diffusers infers a repository.
            dtype: as for `from_pretrained`.
        """
        source = _Source(_text(path), is_file=True, config=None if config is None else _text(config))
        return self._with(source=source, dtype=dtype)

    def with_component(self, name: str, component: Any, *, freeze: bool = False, **loading: str | None) -> Self:
        """Sets a component in place of the source's.

        Args:
            name: the pipeline's name for it, such as "unet" or "image_encoder".
            component: the object, a `ComponentSpec`, a directory or repository, a list of ControlNets, or None to
                leave it out (guider and attention: to take those that the blocks make).
            freeze: whether the weights take no gradients, also those of an object.
            loading: subfolder, variant and revision, for a directory or repository.
        """
        if isinstance(component, (str, os.PathLike)):
            component = ComponentSpec(name, pretrained_model_name_or_path=_text(component), **loading)
        elif loading:
            raise ValueError(f"{name}: {', '.join(loading)} must go with a directory or repository.")
        frozen = self.settings.frozen - {name} | ({name} if freeze else set())
        return self._with(components={**self.settings.components, name: component}, frozen=frozen)

    def with_unet(self, unet: Any, *, freeze: bool = False, **loading: str | None) -> Self:
        """`with_component("unet", ...)`."""
        return self.with_component("unet", unet, freeze=freeze, **loading)

    def with_vae(self, vae: Any, *, freeze: bool = False, **loading: str | None) -> Self:
        """`with_component("vae", ...)`."""
        return self.with_component("vae", vae, freeze=freeze, **loading)

    def with_scheduler(self, scheduler: Any, **loading: str | None) -> Self:
        """`with_component("scheduler", ...)`. A `PeRFlowScheduler` is kept; calls convert any other one."""
        return self.with_component("scheduler", scheduler, freeze=False, **loading)

    def with_controlnet(self, controlnet: Any, *, freeze: bool = False, **loading: str | None) -> Self:
        """`with_component("controlnet", ...)`: a ControlNet, a list of them, or a ControlNet-Union."""
        return self.with_component("controlnet", controlnet, freeze=freeze, **loading)

    def with_guider(self, guider: Any) -> Self:
        """`with_component("guider", ...)`. A delta's recipe does not change its scale."""
        return self.with_component("guider", guider)

    def with_text_encoder(
        self, text_encoder: Any, *, tokenizer: Any = None, number: int = 1, freeze: bool = False, **loading: str | None
    ) -> Self:
        """`with_component("text_encoder", ...)`, or "text_encoder_2" with `number=2`, and its tokenizer."""
        suffix = "" if number == 1 else f"_{number}"
        builder = self.with_component(f"text_encoder{suffix}", text_encoder, freeze=freeze, **loading)
        return builder if tokenizer is None else builder.with_component(f"tokenizer{suffix}", tokenizer)

    def with_ip_adapter(
        self,
        location: PathLike,
        *,
        subfolder: str | None,
        weight_name: str | Sequence[str],
        scale: float = 1.0,
        image_encoder_folder: str | None = "image_encoder",
    ) -> Self:
        """Loads IP-Adapters and their image encoder.

        Args:
            location, subfolder: directory or repository, and where the weights are in it; None for its top.
            weight_name, scale: the file, or a list for several adapters in the order of a call's images; their factor.
            image_encoder_folder: inside `subfolder` unless it has a slash. With None the image encoder is yours to
                set with `with_component`.
        """
        names = (weight_name,) if isinstance(weight_name, str) else tuple(weight_name)
        builder, folder = self._with(ip_adapter=(_text(location), subfolder or "", names, scale)), image_encoder_folder
        if folder is not None:
            folder = f"{subfolder}/{folder}" if subfolder and "/" not in folder else folder
            builder = builder.with_component("image_encoder", location, subfolder=folder)
        return builder

    def with_delta(self, path: PathLike, scale: float = 1.0, variant: str | None = None) -> Self:
        """Has every call merge a delta: a .safetensors file, an index of shards, or a folder of either.

        `scale` is its factor in calls that name none, `variant` ("fp16") tells which of several files in a folder.
        """
        place = str(Path(path).expanduser().resolve())
        return self.with_config(delta=place, delta_scale=scale, delta_variant=variant)

    def with_lora(
        self, location: PathLike, weight: float = 1.0, adapter_name: str | None = None, weight_name: str | None = None
    ) -> Self:
        """Loads a LoRA beside those of other steps: a file, directory or repository, and `weight_name` in it.

        `weight` is its factor. `adapter_name`, without a dot, is its name in peft, by default that of the file or
        directory. LoRAs are loaded in the order of their names, since sums are rounded.
        """
        place = _text(location), weight_name
        name = adapter_name or re.sub(r"\W+", "_", Path(weight_name or place[0]).stem)
        if adapter_name is None and self.settings.loras.get(name, place)[:2] != place:
            raise ValueError(f"with_lora: two LoRAs are called {name!r}; pass adapter_name= to tell them apart.")
        return self._with(loras=dict(sorted({**self.settings.loras, name: (*place, weight)}.items())))

    def with_quantization(self, config: QuantizationConfigMixin | None) -> Self:
        """Quantizes the UNet, after the delta is merged and before LoRAs and IP-Adapters are loaded.

        Calls may name that delta and scale again, or none; others, and `delta=False`, are errors. The merged UNet is
        written to a temporary folder, and diffusers quantizes it as it loads it from there; memory holds both
        meanwhile. A UNet object that you give gets the delta merged and is not quantized itself.

        Args:
            config: what diffusers takes as `from_pretrained(quantization_config=...)`, such as
                `TorchAoConfig(Int8WeightOnlyConfig())` (int8, runs on CPUs too) or
                `BitsAndBytesConfig(load_in_4bit=True)` (needs a GPU, and `on`). None: no quantization.

        Raises:
            ValueError: a config of another kind, such as torchao's own without `TorchAoConfig` around it.
        """
        if not isinstance(config, QuantizationConfigMixin | None):
            raise ValueError(f"with_quantization({config!r}) takes a config of diffusers, such as TorchAoConfig(...).")
        return self._with(quantization=deepcopy(config))

    def with_guidance(self, scale: float, start: float = 0.0, stop: float = 1.0) -> Self:
        """Sets classifier-free guidance of this scale; `start` and `stop` are shares of the steps, in [0, 1]."""
        return self.with_component("guider", {"guidance_scale": scale, "start": start, "stop": stop})

    def with_attention(self, plan: PlanLike | AttentionConfig) -> Self:
        """Sets attention strategies: a plan as `AttentionConfig` takes it, or an `AttentionConfig`."""
        plan = plan if isinstance(plan, AttentionConfig) else deepcopy(plan)
        return self._with(components={**self.settings.components, "attention": plan})

    def with_blocks(self, blocks: Blocks) -> Self:
        """Takes a copy of these blocks in place of the preset: `PeRFlowSDXLAutoBlocks`, or `PeRFlowSDAutoBlocks`."""
        return self._with(blocks=deepcopy(blocks))

    def with_workflow(self, name: str) -> Self:
        """Reduces the blocks to one workflow, such as "text2image", and the components to what it takes."""
        return self._with(workflow=name)

    def insert_block(self, name: str, block: Blocks, *, before: str | None = None, after: str | None = None) -> Self:
        """Inserts a copy of a block next to another one, which an earlier step may have inserted.

        Pass one of `before` and `after`: a block at the top ("decode"), or one of the denoising loops ("solver"): the
        block goes into every loop.
        """
        kept = {other: insertion for other, insertion in self.settings.insertions.items() if other != name}
        return self._with(insertions={**kept, name: (deepcopy(block), before, after)})

    def with_config(self, **values: Any) -> Self:
        """Sets configuration values of the pipeline, such as `num_time_windows=4`."""
        return self._with(config={**self.settings.config, **deepcopy(values)})

    def with_compile(self, **options: Any) -> Self:
        """Compiles the networks in place as `compile_loops` does, with its options."""
        return self._with(compile=options)

    def with_prompt_cache(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> Self:
        """Encodes repeated prompts once; the cache is `pipe.blocks.sub_blocks["text_encoder"]`."""
        return self._with(prompt_cache=max_entries)

    def offload(self, mode: Literal["auto", "group"] | None) -> Self:
        """Keeps models on the CPU while they do not run.

        "auto": the manager moves whole models when memory runs short. "group": layers are moved one by one, which
        takes the least memory and the most time. None: models stay on their device.
        """
        return self._with(offload=mode)

    def on(self, device: str | int | torch.device | None) -> Self:
        """Runs the models on this device. None: the CPU, or with `offload` this machine's accelerator."""
        return self._with(device=device)

    def problems(self) -> list[str]:
        """A sentence for each mistake that `build` would report; loads nothing."""
        return list(_make_plan(self.settings, self.components_manager).problems)

    def describe(self) -> str:
        """What would be built, and the problems with it, as text to print; loads nothing."""
        return _describe(_make_plan(self.settings, self.components_manager))

    def build(self) -> PeRFlowModularPipeline:
        """The pipeline with its components loaded.

        Raises:
            ValueError: all mistakes at once, before anything is loaded. Loading raises what diffusers raises.
        """
        plan = _make_plan(self.settings, self.components_manager)
        plan.problems.refuse("built")
        return _build(plan, self.components_manager, self.collection)

    def build_components(self) -> dict[str, Any]:
        """The components of the pipeline by name, for pipelines of another kind.

        The delta is merged already, the scheduler is the source's, and an attention plan takes effect with
        `components["attention"].attach({"unet": components["unet"]})`. Errors are those of `build` and of merging.
        """
        pipe = self.build()
        _merge_delta(pipe)
        return {name: component for name, component in pipe.components.items() if component is not None}

    def _with(self, **changes: Any) -> Self:
        return replace(self, settings=replace(self.settings, **changes))


def _text(location: PathLike) -> str:
    """A location as text; an existing directory or file by its whole path."""
    path = Path(location).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(location)


class _Plan(NamedTuple):
    """A pipeline with given components, and specs to load others by; `keys` tell which are shared."""

    settings: _Settings
    pipe: PeRFlowModularPipeline
    keys: dict[str, tuple[Any, ...]]
    shared: dict[str, Any]
    device: torch.device
    dtype: torch.dtype
    problems: Problems


def _make_plan(settings: _Settings, manager: ComponentsManager) -> _Plan:
    """Reads indexes, configurations and the headers of files; loads no weights and changes no component."""
    problems, source = Problems(), settings.source
    blocks = _arranged_blocks(settings, problems)
    kind = getattr(blocks, "pipeline_class", PeRFlowModularPipeline)
    pipe = kind(blocks)
    if source is not None and not source.is_file:
        with problems.noted():
            pipe = kind(blocks, source.location, revision=source.revision)
    _choose_components(pipe, settings, problems)
    _configure(pipe, settings, problems)
    device = _resolve_device(settings, manager, problems)
    dtype = _resolve_dtype(pipe, settings, device, problems)
    _check_places(pipe, settings, problems)
    with problems.noted(TypeError):
        _check_delta(pipe)
    if settings.quantization is not None:
        with problems.noted(RuntimeError, about="with_quantization: "):
            DiffusersAutoQuantizer.from_config(settings.quantization).validate_environment()
    plan = _Plan(settings, pipe, {}, {}, device, dtype, problems)
    _find_shared(plan, manager)
    return plan


def _arranged_blocks(settings: _Settings, problems: Problems) -> Any:
    given = settings.blocks
    blocks = _usual_blocks(settings.source, problems) if given is None else deepcopy(given)
    blocks = blocks() if isinstance(blocks, type) else blocks
    if settings.prompt_cache is not None:
        with problems.noted(about="with_prompt_cache: "):
            cache = _PROMPT_CACHES.get(type(blocks.sub_blocks.get("text_encoder")))
            if cache is None:
                raise ValueError("the blocks have no PeRFlowAutoTextEncoderStep 'text_encoder' to replace.")
            blocks.sub_blocks["text_encoder"] = cache(settings.prompt_cache)
    for name, insertion in settings.insertions.items():
        with problems.noted(TypeError, about=f"insert_block({name!r}): "):
            _insert(blocks, name, *insertion)
    if settings.workflow is not None:
        with problems.noted(NotImplementedError, about="with_workflow: "):
            blocks = blocks.get_workflow(settings.workflow)
    return blocks


def _usual_blocks(source: _Source | None, problems: Problems) -> Any:
    """The preset for the source's family. A place that cannot be read is reported by what reads it whole."""
    with suppress(OSError, ValueError, SafetensorError):
        if source is not None and source.is_file:
            with safe_open(source.location, "pt") as file:  # original checkpoints of SD name their encoder so
                is_sd = any(name.startswith("cond_stage_model.") for name in file.keys())
            return make_preset(SD_PRESET if is_sd else SDXL_PRESET)
        if source is not None:
            if has_own_blocks(source.location, revision=source.revision):
                problems.add(
                    f"{source.location} has blocks of its own, and its code is not run here; call "
                    "with_blocks(load_workflow(...).blocks), or with_blocks of a preset."
                )
            return preset_for(source.location, revision=source.revision)
    return make_preset(SDXL_PRESET)


def _insert(blocks: Any, name: str, block: Any, before: str | None, after: str | None) -> None:
    block, neighbour = deepcopy(block), before or after
    if neighbour not in blocks.sub_blocks or (before and after):
        insert_loop_block(blocks, name, block, before=before, after=after)
    elif name in blocks.sub_blocks:
        raise ValueError(f"a block is called {name!r} already; choose another name.")
    else:
        index = list(blocks.sub_blocks).index(neighbour) + (after is not None)
        blocks.sub_blocks.insert(name, block() if isinstance(block, type) else block, index)


def _choose_components(pipe: PeRFlowModularPipeline, settings: _Settings, problems: Problems) -> None:
    """Puts the given components into the pipeline, and how to load the others into its specs."""
    declared, source, missing = {s.name: s for s in pipe._blocks.expected_components}, settings.source, list[str]()
    if unknown := settings.components.keys() - declared.keys():
        problems.add(f"the blocks take no component {', '.join(unknown)}; they take {', '.join(declared)}.")
    for name, usual in declared.items():
        spec, is_made = pipe._component_specs[name], usual.default_creation_method == "from_config"
        if settings.components.get(name) is not None:
            with problems.noted(TypeError, about=f"{name}: "):
                _choose(pipe, usual, settings.components[name])
        elif name in settings.components or spec.type_hint is None:  # [null, null] in an index: there is none
            pipe._component_specs[name] = deepcopy(usual)
            if is_made:
                put_components(pipe, {name: usual.create()})
        elif source is not None and source.is_file and name in IN_FILE:
            spec.pretrained_model_name_or_path = source.location
        elif spec.pretrained_model_name_or_path is None and name in REQUIRED:
            missing.append(name)
        elif source is not None and str(spec.pretrained_model_name_or_path) == source.location:
            spec.revision = source.revision or spec.revision
            if issubclass(spec.type_hint, nn.Module):
                spec.variant = source.variant or spec.variant
    if missing:
        problems.add(f"{', '.join(missing)} missing; call from_pretrained, from_single_file or with_component.")


def _choose(pipe: PeRFlowModularPipeline, usual: ComponentSpec, value: Any) -> None:
    """Puts a component that the user chose into the pipeline, or its spec."""
    name, kind = usual.name, usual.type_hint
    if isinstance(value, ComponentSpec):
        spec = replace(value, name=name, type_hint=value.type_hint or kind)
        is_file = Path(str(spec.pretrained_model_name_or_path)).is_file()
        if value.type_hint is None and isinstance(kind, type) and issubclass(kind, ModelMixin) and not is_file:
            spec.type_hint = None  # the configuration names the class, which may be a ControlNet-Union's
        if spec.default_creation_method == "from_pretrained":
            pipe._component_specs[name] = spec
            return
        value = spec.create()
    if name == "guider":
        value = ClassifierFreeGuidance(**value) if isinstance(value, Mapping) else value
        check_guider(value)
    elif name == "attention" and not isinstance(value, AttentionConfig):
        value = AttentionConfig(value)
    elif name == "controlnet" and isinstance(value, (list, tuple)):
        value = MultiControlNetModel(value)
    put_components(pipe, {name: value})


def _configure(pipe: PeRFlowModularPipeline, settings: _Settings, problems: Problems) -> None:
    """Gives the pipeline its configuration values. Those that the blocks do not declare would have no effect."""
    values, declared = settings.config, pipe._config_specs
    for name, value in values.items():
        if name not in declared and (not name.startswith("delta_") or value not in (None, 1.0)):
            problems.add(f"the blocks take no {name}={value!r}; they take {', '.join(declared) or 'none'}.")
    for name, given in (("attention", "attention_plan"), ("guider", "guidance_scale")):
        if settings.components.get(name) is not None and values.get(given) is not None:
            problems.add(f"with_{name} and with_config({given}=...) are both given; leave one of them out.")
    pipe.update_components(**{name: value for name, value in values.items() if name in declared})


def _resolve_device(settings: _Settings, manager: ComponentsManager, problems: Problems) -> torch.device:
    mode, device = settings.offload, torch.device("cpu")
    wanted = settings.device if settings.device is not None else get_device() if mode else "cpu"
    with problems.noted(RuntimeError, AssertionError, TypeError, NotImplementedError, about=f"on({wanted!r}): "):
        device = torch.empty(0, device=wanted).device  # "cuda" becomes a device with a number
    if mode not in (None, "auto", "group"):
        problems.add(f"offload({mode!r}) must be 'auto', 'group' or None.")
    elif mode is not None and device.type == "cpu":
        problems.add(f'offload({mode!r}) needs another device than the CPU; name it with on("cuda"), or leave it out.')
    if settings.compile is not None and (mode or manager.model_hooks):
        problems.add("with_compile does not work with models that are offloaded; leave one of the two out.")
    return device


def _resolve_dtype(pipe: Any, settings: _Settings, device: torch.device, problems: Problems) -> torch.dtype:
    """The type of all models; a VAE that is given may have another one."""
    models = {name: getattr(pipe, name, None) for name in (*LORA_MODELS, "controlnet")}
    given = {name: model.dtype for name, model in models.items() if isinstance(model, nn.Module)}
    dtype: Any = settings.dtype
    if dtype == "auto":
        computes = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        half = torch.bfloat16 if computes else torch.float16
        dtype = next(iter(given.values()), torch.float32 if device.type == "cpu" else half)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        problems.add(f"dtype={dtype!r} must be 'auto', torch.float32, torch.float16 or torch.bfloat16.")
    for name, found in given.items():
        if found != dtype:
            problems.add(f"{name} is {found}, other models are {dtype}; pass {name}.to({dtype}), or dtype={found}.")
    return dtype


def _check_places(pipe: PeRFlowModularPipeline, settings: _Settings, problems: Problems) -> None:
    """Files and directories that are not there."""
    places = {location: "with_lora" for location, *_ in settings.loras.values()}
    if (source := settings.source) and source.is_file and Path(source.location).is_dir():
        problems.add(f"from_single_file: {source.location} is a directory; pass a file, or call from_pretrained.")
    if settings.ip_adapter is not None:
        location, subfolder, names, _ = settings.ip_adapter
        files = [str(Path(location, subfolder, name)) for name in names] if Path(location).is_dir() else [location]
        places |= dict.fromkeys(files, "with_ip_adapter")
    for name, spec in _pending(pipe).items():
        root = Path(str(spec.pretrained_model_name_or_path))
        places.setdefault(str(root / (spec.subfolder or "") if root.is_dir() else root), name)
    for place, about in places.items():
        is_local = Path(place).is_absolute() or place.startswith(".") or place.count("/") != 1
        if (is_local or place.endswith(".safetensors")) and not Path(place).exists():
            problems.add(f"{about}: {place} does not exist; pass a file, directory, or a repository as owner/name.")


def _pending(pipe: PeRFlowModularPipeline) -> dict[str, ComponentSpec]:
    """The components that are to be loaded."""
    specs = pipe._component_specs.items()
    return {n: spec for n, spec in specs if spec.pretrained_model_name_or_path and getattr(pipe, n, None) is None}


def _check_delta(pipe: PeRFlowModularPipeline) -> None:
    """Compares a local delta with the UNet's configuration; a single file has none, so that calls compare it."""
    named, origin = pipe.config.get("delta"), pipe._pretrained_model_name_or_path
    if named is None or (origin is not None and not Path(origin).is_dir() and not Path(named).is_absolute()):
        return  # no delta, or one on the Hub
    weights = open_weights(delta_path(None, pipe) or "", pipe.config.get("delta_variant"))
    read_recipe(weights)
    unet, spec = unwrap_module(getattr(pipe, "unet", None)), _pending(pipe).get("unet")
    if spec is not None and not Path(str(spec.pretrained_model_name_or_path)).is_file():
        where = {"subfolder": spec.subfolder, "revision": spec.revision}
        config = UNet2DConditionModel.load_config(spec.pretrained_model_name_or_path, **where)
        with torch.device("meta"):  # the architecture without values takes no memory
            unet = UNet2DConditionModel.from_config(config)
    if unet is not None and not getattr(unet, "is_quantized", False):  # the call's error says what to do
        require_architecture(weights, unet)


def _find_shared(plan: _Plan, manager: ComponentsManager) -> None:
    """Notes components that are there already: of the manager, or given ones that a builder has seen before."""
    settings, pending, pipe = plan.settings, _pending(plan.pipe), plan.pipe
    is_moved = settings.offload == "auto" or manager.model_hooks is not None
    given = {name: model for name, model in pipe.components.items() if isinstance(model, nn.Module)}
    for name in (*pending, *given):
        key = plan.keys[name] = (
            pending[name].load_id if name in pending else "given",
            (plan.dtype, None if is_moved else str(plan.device), settings.offload == "group", name in settings.frozen),
            # By the config's text: those of torchao are equal whatever they say.
            (settings.ip_adapter, repr(settings.quantization), *map(pipe.config.get, DELTA_VALUES))
            if name == "unet"
            else None,
            settings.loras if name in LORA_MODELS else None,
            settings.compile if name in ("unet", "controlnet", "vae") else None,
        )
        known = manager.get_components_by_ids(manager.get_ids(name), return_dict_with_names=False).values()
        for component in [given[name]] if name in given else known:
            if getattr(unwrap_module(component), MARK, None) == _state(component, key):
                plan.shared[name] = component
    if settings.loras and not plan.shared.keys() >= plan.keys.keys() & set(LORA_MODELS):
        for name in LORA_MODELS:
            plan.shared.pop(name, None)
    for name in given.keys() - plan.shared.keys():
        held, was_built = ", ".join(_state(given[name], ())[1]), hasattr(unwrap_module(given[name]), MARK)
        is_quantized = name == "unet" and settings.quantization is not None
        if held and (settings.loras or settings.ip_adapter or is_quantized or was_built):
            plan.problems.add(f"{name} holds {held} already, which no step names; unload it, or pass another {name}.")


def _state(component: Any, key: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is equal while a component is as it was built and wanted; second come its LoRAs, and IP-Adapters as one."""
    model = unwrap_module(component)
    has_ip_adapter = getattr(getattr(model, "config", None), "encoder_hid_dim_type", None) == "ip_image_proj"
    adapters = [*(getattr(model, "peft_config", None) or ()), *(["an IP-Adapter"] if has_ip_adapter else [])]
    return (key, sorted(adapters), getattr(component, "dtype", None))


def _build(plan: _Plan, manager: ComponentsManager, collection: str | None) -> PeRFlowModularPipeline:
    settings, pipe = plan.settings, plan.pipe
    put_components(pipe, {**_loaded(plan), **plan.shared})
    if settings.quantization is not None and "unet" in plan.keys.keys() - plan.shared.keys():
        _quantize(plan)
    for name in settings.frozen:
        getattr(pipe, name).requires_grad_(False)
    if "unet" not in plan.shared:
        _add_adapters(pipe, settings)
    if settings.offload == "group":
        for name, model in pipe.components.items():
            if isinstance(model, nn.Module) and name not in plan.shared:
                offload_in_groups(model, onload_device=plan.device, offload_type="leaf_level")
    elif settings.offload is None and settings.device is not None and manager.model_hooks is None:
        pipe.to(plan.device)
    for name in plan.keys.keys() - plan.shared.keys():
        component = getattr(pipe, name)
        setattr(unwrap_module(component), MARK, _state(component, plan.keys[name]))
    if settings.compile is not None:
        compile_loops(pipe, **settings.compile)
    # Last, so that a failure leaves nothing in the manager.
    pipe._components_manager, pipe._collection = manager, collection
    for name in pipe.pretrained_component_names:
        if getattr(pipe, name) is not None and (collection or name not in plan.shared):
            manager.add(name, getattr(pipe, name), collection)
    if settings.offload == "auto" and manager.model_hooks is None:
        manager.enable_auto_cpu_offload(device=plan.device)
    return pipe


def _loaded(plan: _Plan) -> dict[str, Any]:
    """The components that are not there yet."""
    source = plan.settings.source
    wanted = {name: spec for name, spec in _pending(plan.pipe).items() if name not in plan.shared}
    checkpoint = {source.location} if source is not None and source.is_file else set()
    in_file = [name for name, spec in wanted.items() if spec.pretrained_model_name_or_path in checkpoint]
    loaded = {name: spec.load(dtype=plan.dtype) for name, spec in wanted.items() if name not in in_file}
    if in_file and source is not None:
        absent: dict[str, Any] = dict.fromkeys(set(IN_FILE).difference(in_file))
        if isinstance(plan.pipe, PeRFlowSDModularPipeline):
            kind: Any = StableDiffusionPipeline
            absent = {name: None for name in absent if not name.endswith("_2")}
            absent |= {"safety_checker": None, "feature_extractor": None}
        else:
            kind = StableDiffusionXLPipeline
            absent["add_watermarker"] = False
        classic = kind.from_single_file(source.location, config=source.config, dtype=plan.dtype, **absent)
        loaded |= {name: getattr(classic, name) for name in in_file}
        if "scheduler" in in_file:
            classic.scheduler._diffusers_load_id = "null"  # diffusers' mark of components that no user set
    return loaded


def _merge_delta(pipe: PeRFlowModularPipeline) -> None:
    """As the first call would."""
    for block in pipe.blocks.sub_blocks.values():
        if isinstance(block, PeRFlowMergeDeltaStep):
            block(pipe, PipelineState())


def _quantize(plan: _Plan) -> None:
    """Puts a quantized copy of the UNet, merged, into the pipeline; its configuration says what is merged."""
    _merge_delta(plan.pipe)
    unet: Any = unwrap_module(plan.pipe.components["unet"])
    config = deepcopy(plan.settings.quantization)  # diffusers writes into it
    with TemporaryDirectory() as folder:
        unet.save_pretrained(folder)
        # A memory map would keep the whole files as long as one weight lives that is not quantized.
        quantized = type(unet).from_pretrained(folder, quantization_config=config, dtype=plan.dtype, disable_mmap=True)
    quantized.register_to_config(_name_or_path=unet.config.get("_name_or_path", ""))
    put_components(plan.pipe, {"unet": quantized})


def _add_adapters(pipe: Any, settings: _Settings) -> None:
    for name, (location, weight_name, _) in settings.loras.items():
        pipe.load_lora_weights(location, adapter_name=name, weight_name=weight_name)
    if settings.loras:
        pipe.set_adapters(list(settings.loras), [weight for *_, weight in settings.loras.values()])
    if settings.ip_adapter is not None:
        location, subfolder, names, scale = settings.ip_adapter
        pipe.load_ip_adapter(location, subfolder=subfolder, weight_name=list(names))
        pipe.set_ip_adapter_scale(scale)


def _describe(plan: _Plan) -> str:
    settings, pipe = plan.settings, plan.pipe
    lines = [f"{type(pipe._blocks).__name__} in {plan.dtype} on {plan.device}"]
    names = ("workflow", "loras", "ip_adapter", "quantization", "insertions", "compile", "prompt_cache", "offload")
    values = {name: value for name in names if (value := getattr(settings, name)) not in (None, {})}
    lines += [f"{name}: {' '.join(str(value).split())}" for name, value in values.items()]
    lines += [f"{name}: {value}" for name in pipe._config_specs if (value := pipe.config[name]) is not None]
    for name, component in pipe.components.items():
        text, given = "none" if component is None else type(component).__name__, settings.components.get(name)
        text = f"{text}, {given}" if isinstance(given, (Mapping, str, list)) else text
        if name in _pending(pipe):
            place = pipe._component_specs[name].load_id.replace("|null", "").replace("|", " ")
            text = f"{'shared' if name in plan.shared else 'load'} from {place}"
        lines.append(f"  {name}: {text}")
    return "\n".join([*lines, *(f"problem: {problem}" for problem in plan.problems)])
