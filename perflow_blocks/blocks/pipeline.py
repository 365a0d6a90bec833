"""The pipeline of this package's presets: diffusers' modular SDXL pipeline with the habits of the classic one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from copy import deepcopy
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    ComponentsManager,
    ConfigMixin,
    ModelMixin,
    SchedulerMixin,
    StableDiffusionXLModularPipeline,
    UNet2DModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE, _best_guess_weight_name
from diffusers.modular_pipelines.components_manager import custom_offload_with_hook
from diffusers.modular_pipelines.modular_pipeline import ModularPipeline, ModularPipelineBlocks, PipelineState
from diffusers.utils import _get_model_file
from diffusers.utils.torch_utils import get_device
from safetensors import SafetensorError, safe_open
from torch import nn

from ..atomic_files import atomic_directory, atomic_path
from ..delta.files import DIGEST_KEY
from ..delta.merge import merge_records
from .block_source import (
    SD_PRESET,
    SDXL_PRESET,
    UNCONDITIONAL_PRESET,
    block_files,
    load_blocks,
    make_preset,
    require_sound,
)
from .finite_guard import is_offloaded
from .saving import carry_over, is_stock, prepare, save_delta_file

CPU = torch.device("cpu")

HUB_OPTIONS = frozenset(
    {"cache_dir", "force_download", "local_dir", "local_files_only", "proxies", "revision", "subfolder", "token"}
)
"""What `from_pretrained` of diffusers' modular pipelines hands to the Hub. It ignores other options with a warning."""

IN_PLACE_OF = {
    "adapter_conditioning_factor": "T2I-Adapters are not supported; use a ControlNet and control_image",
    "adapter_conditioning_scale": "T2I-Adapters are not supported; use a ControlNet and control_image",
    "callback": "pass callback_on_step_end=function, called as function(pipe, step, timestep, {'latents': latents})",
    "callback_on_step_end": "insert a StepCallbackStep into the loop",
    "callback_on_step_end_tensor_inputs": "leave it out; the callback gets the latents",
    "callback_steps": "leave it out, and pass callback_on_step_end=, which is called after every step",
    "eta": "leave it out; the solver adds no noise",
    "guidance_rescale": "call pipe.update_components(guider=ClassifierFreeGuidance(guidance_rescale=...))",
    "guidance_scale": (
        "leave it out for a model without prompts; for others call "
        "pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=...))"
    ),
    "image_guidance_scale": "InstructPix2Pix is not supported; pass image and strength",
    "ip_adapter_image_embeds": (
        "pass the second half of each tensor in the list as ip_adapter_embeds=, the first half as "
        "negative_ip_adapter_embeds="
    ),
    "pag_adaptive_scale": "leave it out; set pipe.update_components(guider=PerturbedAttentionGuidance(...))",
    "pag_scale": "call pipe.update_components(guider=PerturbedAttentionGuidance(perturbed_guidance_scale=...))",
    "sigmas": "pass num_inference_steps=, or timesteps=; the time windows give the noise levels",
}
"""What to write in place of the arguments of diffusers' classic SDXL pipelines that a modular one does not take."""


class PeRFlowModularPipeline(StableDiffusionXLModularPipeline):
    """A modular SDXL pipeline that refuses unknown inputs and comes back from `save_pretrained` as it was.

    `init_pipeline` of this package's presets, the builder and the demo return it. For blocks that you composed, pass
    them: `PeRFlowModularPipeline(blocks=blocks, pretrained_model_name_or_path=...)`; for the models of a classic
    pipeline, `PeRFlowModularPipeline.from_pipe(classic)`. `docs/from-classic.md` lists what to write for each habit of
    `StableDiffusionXLPipeline`.
    """

    default_blocks_name = None
    _offload_hooks: tuple[Any, ...] = ()

    def __init__(
        self,
        blocks: ModularPipelineBlocks | None = None,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        place = pretrained_model_name_or_path
        if is_directory := place is not None and Path(place).is_dir():
            require_sound(Path(place))
        try:
            super().__init__(blocks, None if place is None else str(place), *args, **kwargs)
        except (AttributeError, TypeError) as error:
            if not is_directory:
                raise
            raise ValueError(f"the index of {place} has a broken entry ({error}); save it again.") from error
        # diffusers takes its own blocks, in silence, for a class of blocks that it does not know.
        self.register_to_config(_blocks_class_name=None)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        trust_remote_code: bool | None = None,
        components_manager: ComponentsManager | None = None,
        collection: str | None = None,
        workflow: str | None = None,
        **kwargs: Any,
    ) -> PeRFlowModularPipeline:
        """The pipeline of a directory or repository; call `load_components()` on it.

        Presets of this package come back by name. A repository without blocks, such as a plain SDXL model, gets
        `PeRFlowSDXLAutoBlocks`, one of Stable Diffusion 1.5 or 2.1 a `PeRFlowSDModularPipeline` of
        `PeRFlowSDAutoBlocks`, and one of a `UNet2DModel` `PeRFlowUnconditionalBlocks`.

        Args:
            pretrained_model_name_or_path: a directory or the id of a repository of the Hub.
            trust_remote_code: whether the repository's own blocks may run, which other blocks than presets need.
            components_manager, collection: as in diffusers.
            workflow: keep only the blocks of one of the preset's workflows, such as "text2image".
            kwargs: `revision`, `token`, `cache_dir` and the other options of downloads.

        Raises:
            ValueError: the repository has code of its own, and `trust_remote_code` is not set; or the index of a
                directory is broken, or names files outside it.
        """
        unknown = sorted(kwargs.keys() - HUB_OPTIONS)
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} is not an option of from_pretrained; pass types, variants and devices to "
                "load_components(dtype=..., variant=...) and to(device), and components to update_components(...)."
            )
        place = str(pretrained_model_name_or_path)
        blocks = load_blocks(place, trust_remote_code, **kwargs)
        pipe = cls._for(blocks)(blocks, place, components_manager, collection, workflow, **kwargs)
        for spec in pipe._component_specs.values():
            if spec.pretrained_model_name_or_path == place:
                spec.revision = spec.revision or kwargs.get("revision")
                if spec.type_hint is None:  # model_index.json says that the model has no such component
                    spec.pretrained_model_name_or_path = None
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, blocks: ModularPipelineBlocks | None = None) -> PeRFlowModularPipeline:
        """A pipeline with the components of one in memory, for example a `StableDiffusionXLControlNetPipeline`.

        Models are shared, with the LoRAs and deltas in them; the scheduler is a copy. Components that the blocks do
        not take are left out.

        Args:
            pipeline: any pipeline of diffusers for SDXL or Stable Diffusion 1.5 or 2.1, or an unconditional one.
            blocks: the blocks to run, which are copied; by default the preset of the pipeline's family.
        """
        if blocks is None:
            preset = SDXL_PRESET if "tokenizer_2" in pipeline.components else SD_PRESET
            of_pixels = isinstance(pipeline.components.get("unet"), UNet2DModel)
            blocks = make_preset(UNCONDITIONAL_PRESET if of_pixels else preset)
        pipe = cls._for(blocks)(blocks=deepcopy(blocks))
        # A configuration names its delta relative to the directory that it came from.
        pipe._pretrained_model_name_or_path = getattr(pipeline, "_pretrained_model_name_or_path", None)
        given, specs = pipeline.components.items(), pipe._component_specs
        taken = {name: value for name, value in given if name in specs and value is not None}
        if "scheduler" in taken:
            scheduler = deepcopy(taken["scheduler"])
            scheduler._diffusers_load_id = "null"  # diffusers' mark of components that no user set
            taken["scheduler"] = scheduler
        put_components(pipe, taken)
        pipe.update_components(
            **{name: value for name, value in pipeline.config.items() if name in pipe._config_specs}
        )
        return pipe

    def update_components(self, **kwargs: Any) -> None:
        """As in diffusers. The path of a `delta` is from the working directory, or else from the pipeline's own."""
        if isinstance(delta := kwargs.get("delta"), (str, os.PathLike)):
            place = Path(delta).expanduser()
            kwargs["delta"] = str(place.absolute() if place.exists() else delta)
        super().update_components(**kwargs)

    @classmethod
    def _for(cls, blocks: Any) -> type[PeRFlowModularPipeline]:
        """This class, or the one for the family that the blocks are made for, if it derives from this one."""
        wanted = getattr(blocks, "pipeline_class", cls)
        if not issubclass(wanted, cls) and not issubclass(cls, wanted):
            raise ValueError(f"{type(blocks).__name__} does not run in a {cls.__name__}; use {wanted.__name__}.")
        return wanted if issubclass(wanted, cls) else cls

    def __call__(
        self,
        state: PipelineState | str | list[str] | None = None,
        output: str | list[str] | None = None,
        *,
        return_dict: bool = True,
        **inputs: Any,
    ) -> Any:
        """Runs the blocks; `print(pipe.doc)` describes their inputs.

        Args:
            state: a prompt or a list of prompts, or a state to go on from.
            output: the name of what to return, or a list of names for a dictionary; by default the whole state, whose
                `images` are an attribute.
            return_dict: False returns the tuple `(images,)`.
            inputs: those of the blocks, and dictionaries of a `kwargs_type`, such as `denoiser_input_fields`.

        Raises:
            ValueError: an input or output that the blocks do not know, or what the blocks raise.
        """
        if state is not None and not isinstance(state, PipelineState):
            if "prompt" in inputs:
                raise ValueError("prompt is given twice, by position and by name; leave one out.")
            inputs["prompt"], state = state, None
        unknown = inputs.keys() - self._input_names
        if unknown:
            known = self._input_names
            raise ValueError(
                " ".join(f"{name} is not an input of this pipeline{_instead(name, known)}" for name in sorted(unknown))
            )
        if not return_dict:
            if output is not None:
                raise ValueError(f"return_dict=False and output={output!r} are both given; leave one out.")
            output = ["images"]
        held = self._output_names.union(inputs, () if state is None else state.values)
        for name in [output] if isinstance(output, str) else output or ():
            if name not in held:  # a state says None of it
                raise ValueError(f"output={name!r} is not an output of this pipeline{_instead(name, held)}")
        with self._offload_lock if self._offload_hooks else nullcontext():  # calls would take each other's models away
            try:
                result = super().__call__(state, output, **inputs)
            finally:
                self.maybe_free_model_hooks()
        return result if return_dict else (result["images"],)

    @cached_property
    def _input_names(self) -> frozenset[str]:
        """Of the blocks, which a pipeline keeps for good: `pipe.blocks` is a copy."""
        inputs = self._blocks.inputs
        return frozenset(name for entry in inputs for name in (entry.name, entry.kwargs_type) if name)

    @cached_property
    def _output_names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in (*self._blocks.intermediate_outputs, *self._blocks.outputs))

    def load_components(
        self, names: list[str] | str | None = None, workflow: str | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers, but without a `dtype` all models are float32, also text encoders that a file holds in less.

        Args:
            names, workflow: which components; by default all that have a place to load from.
            kwargs: `dtype`, `variant` and other options of `from_pretrained`, for all or by component.
        """
        if not {"dtype", "torch_dtype"} & kwargs.keys():
            kwargs["dtype"] = torch.float32
        super().load_components(names, workflow, **kwargs)

    # Saving

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Writes a directory that comes back with the same blocks, components, settings and image.

        Load it with `PeRFlowModularPipeline.from_pretrained(directory)`, or with diffusers'
        `ModularPipeline.from_pretrained(directory, trust_remote_code=True)`, and `load_components()`. A merged delta
        stays merged, and its file is copied. The pipeline itself does not change. A directory that is there already
        is replaced as a whole, at the end, and keeps its other files.

        Args:
            save_directory: where to.
            args, kwargs: as in diffusers: `safe_serialization`, `variant`, `max_shard_size`, and `push_to_hub` with
                `repo_id`, `token`, `private`, `commit_message`, `create_pr`. It uploads what is saved now, not other
                files of the directory; if it fails, the directory stays as it was.

        Raises:
            ValueError: names all that would not come back, such as a LoRA, before anything is written.
        """
        saver, delta = prepare(self)
        directory = Path(save_directory)
        options = {"overwrite_modular_index": True, "repo_id": Path(os.path.abspath(directory)).name, **kwargs}
        with atomic_directory(directory) as folder:
            if delta is not None:
                save_delta_file(delta, folder / saver.config.delta)
            super(PeRFlowModularPipeline, saver).save_pretrained(str(folder), *args, **options)
            index = folder / self.config_name
            text = index.read_text(encoding="utf-8").replace(json.dumps(str(folder)), json.dumps(str(directory)))
            index.write_text(text, encoding="utf-8", newline="\n")
            if directory.is_dir():
                carry_over(directory, folder)

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes the index and the blocks, without components; `save_pretrained` writes both.

        Raises:
            ValueError: a block whose class or arguments no file can name.
        """
        for name, text in {**block_files(self.blocks), self.config_name: self.to_json_string()}.items():
            with atomic_path(Path(save_directory) / name) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
        if push_to_hub:
            super().save_config(str(save_directory), push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The index, with a class that diffusers has and without unset values."""
        index = json.loads(super().to_json_string())
        defaults = {spec.name: spec.default for spec in self._blocks.expected_configs}
        index = {name: value for name, value in index.items() if value is not None or defaults.get(name) is not None}
        return json.dumps({**index, "_class_name": stock_class_name(self)}, indent=2) + "\n"

    # Where models are

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keeps each model on the CPU and brings it to a device while it runs; UNet and ControlNet stay together.

        Calls from several threads run one after another. Call it again after setting another model.
        `remove_all_hooks()` ends it and leaves the models on the CPU.

        Args:
            gpu_id: index of the accelerator, by default that of `device`, else 0.
            device: where models run, by default this machine's accelerator, else the CPU.

        Raises:
            ValueError: models are offloaded in groups.
        """
        target = torch.device(get_device() if device is None else device)
        if target.type != "cpu":
            target = torch.device(target.type, (target.index or 0) if gpu_id is None else gpu_id)
        self._maybe_raise_error_if_group_offload_active(raise_error=True)
        self.remove_all_hooks()
        self.to(CPU, silence_dtype_warnings=True)
        models = [(name, model) for name, model in self.components.items() if isinstance(model, nn.Module)]
        hooks = [custom_offload_with_hook(name, model, target, _to_offload) for name, model in models]
        for hook in hooks:
            for other in hooks:
                if other is not hook:
                    hook.add_other_hook(other)
        self._offload_hooks, self._offload_lock = tuple(hooks), threading.RLock()

    def maybe_free_model_hooks(self) -> None:
        """Takes all models back to the CPU under `enable_model_cpu_offload`; each call ends with it."""
        for hook in self._offload_hooks:
            hook.offload()

    def remove_all_hooks(self) -> None:
        """Ends `enable_model_cpu_offload`; call `pipe.to(device)` for models that stay on a device."""
        self.maybe_free_model_hooks()
        for hook in self._offload_hooks:
            hook.remove()
        self._offload_hooks = ()

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        *,
        exclude_modules: str | list[str] | None = None,
        **settings: Any,
    ) -> None:
        """Keeps the layers of all models on one device and brings some at a time to another while they run.

        Args:
            onload_device: where layers run.
            exclude_modules: names of models that go to `onload_device` whole.
            settings: those of `diffusers.hooks.apply_group_offloading`: `offload_type="leaf_level"` for single layers,
                or "block_level" with `num_blocks_per_group=`; `use_stream=True`.
        """
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        for name, model in self.components.items():
            if not isinstance(model, nn.Module):
                continue
            if name in excluded:
                model.to(onload_device)
            else:
                offload_in_groups(model, onload_device=torch.device(onload_device), **settings)

    # LoRA

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: Any, adapter_name: str | None = None, **settings: Any
    ) -> None:
        """Loads a LoRA as `StableDiffusionXLPipeline.load_lora_weights` does, unless its delta is merged already.

        The file of a LoRA that `save_lora` made from a delta names that delta. Merging it while the LoRA is loaded
        raises an error too, at the call.

        Raises:
            ValueError: the delta that the LoRA was made from is merged into the UNet, or what diffusers raises.
        """
        source, digest = pretrained_model_name_or_path_or_dict, ""
        if not isinstance(source, dict) and settings.get("use_safetensors") is not False:
            digest, settings = _delta_of_lora(source, settings)
        for record in merge_records(self.unet) if digest else ():
            if record.digest == digest and record.scale:
                raise ValueError(
                    f"the LoRA {source} was made from {record.source}, which is merged into the UNet already; call "
                    "unmerge_delta(pipe.unet) and pass delta=False, or the LoRA's residual as delta=, from then on."
                )
        before = set(getattr(self.unet, "peft_config", ()))
        super().load_lora_weights(source, adapter_name, **settings)
        adapters = getattr(self.unet, "peft_config", {})
        for name in adapters.keys() - before | adapters.keys() & {adapter_name}:
            setattr(adapters[name], DIGEST_KEY, digest)

    @property
    def _execution_device(self) -> torch.device:
        """Where the models run. diffusers walks all their modules to find this out; 24 ms a call for SDXL."""
        models = [model for model in self.components.values() if isinstance(model, nn.Module)]
        if any(map(is_offloaded, models)):
            return super()._execution_device
        return next((weight.device for model in models for weight in model.parameters()), CPU)


def stock_class_name(pipe: Any) -> str:
    """The name of the pipeline's nearest class in diffusers, which an index can name."""
    return next(kind.__name__ for kind in type(pipe).__mro__ if is_stock(kind) and issubclass(kind, ModularPipeline))


class PeRFlowSDModularPipeline(  # diffusers' SDXL class has what its blocks read, such as `vae_scale_factor`
    PeRFlowModularPipeline, StableDiffusionLoraLoaderMixin, StableDiffusionXLModularPipeline
):
    """The same for Stable Diffusion 1.5 and 2.1, with diffusers' LoRA loader for their one text encoder.

    `PeRFlowSDAutoBlocks().init_pipeline(...)` returns it, and `PeRFlowModularPipeline.from_pretrained` of a repository
    with one text encoder.
    """


def put_components(pipe: Any, components: Mapping[str, Any]) -> None:
    """Gives a pipeline components of any kind.

    `update_components` refuses those that have neither a configuration nor a place that they were loaded from.
    """
    for name, component in components.items():
        load_id = getattr(component, "_diffusers_load_id", None)
        is_model = isinstance(component, (ConfigMixin, nn.Module)) and not isinstance(component, SchedulerMixin)
        if not is_model and (load_id == "null" or (load_id is None and name in pipe.config_component_names)):
            pipe.register_components(**{name: component})
        else:
            pipe.update_components(**{name: component})


def offload_in_groups(model: nn.Module, **settings: Any) -> None:
    """diffusers' group offloading with its settings, for models of transformers too."""
    if isinstance(model, ModelMixin):
        model.enable_group_offload(**settings)
    else:
        apply_group_offloading(model, **settings)


def _instead(name: Any, known: Iterable[str]) -> str:
    """The end of an error's sentence about an unknown name."""
    if name in IN_PLACE_OF:
        return f"; {IN_PLACE_OF[name]}."
    nearest = get_close_matches(str(name), sorted(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else "; print(pipe.doc) lists what there is."


def _to_offload(hooks: list[Any], model_id: str, **_: Any) -> list[Any]:
    """Which models on the device make room for one that is to run: all, but not its partner in the steps."""
    return [hook for hook in hooks if {hook.model_id, model_id} != {"unet", "controlnet"}]


def _delta_of_lora(source: Any, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The digest of the delta that a LoRA's file names, else "", and the settings with the file's name for diffusers.

    A file that cannot be found or read is left to diffusers, which says so.
    """
    where = {name: settings[name] for name in HUB_OPTIONS & settings.keys() - {"local_dir", "force_download"}}
    try:
        name = settings.get("weight_name") or _best_guess_weight_name(
            source, local_files_only=where.get("local_files_only", False)
        )
        with safe_open(_get_model_file(source, weights_name=name or LORA_WEIGHT_NAME_SAFE, **where), "pt") as file:
            return (file.metadata() or {}).get(DIGEST_KEY, ""), {**settings, "weight_name": name}
    except (OSError, ValueError, IndexError, SafetensorError):
        return "", settings
