"""The chain of steps that assembles a pipeline."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ComponentsManager, ModularPipeline
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec

from ..attention.config import AttentionConfig, PlanLike
from ..blocks.prompt_cache import DEFAULT_MAX_ENTRIES
from ..blocks.settings import complaint
from .describe import describe
from .loading import build_pipeline, merge_now
from .plan import make_plan
from .settings import (
    BuilderSettings,
    ComponentChoice,
    DeltaChoice,
    DtypeLike,
    Insertion,
    IPAdapterChoice,
    LoraChoice,
    OffloadMode,
    Repository,
    SingleFile,
)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True, eq=False)
class PeRFlowPipelineBuilder:
    """Assembles a PeRFlow pipeline in one chain of steps.

    Each step returns a new builder and leaves the old one as it is, so that one may be the start of several. The order
    of steps does not matter. A step that is taken again replaces what it said before, of the same component, LoRA,
    block or configuration value. Nothing is read before `describe`, `problems` or `build`, and nothing is loaded
    before `build` has found that all of it fits.

    Builders with one `ComponentsManager` share what they load: the same weights in the same type, on the same device
    and with the same delta, LoRAs and adapters are loaded once. A builder shares the manager of the one that it came
    from. What is done to a shared component outside a builder, all of its pipelines see; one whose LoRAs or
    IP-Adapters or type were changed is not shared with pipelines that are built after that.

    Example:
        >>> builder = (
        ...     PeRFlowPipelineBuilder()
        ...     .from_pretrained("stabilityai/stable-diffusion-xl-base-1.0", variant="fp16")
        ...     .with_delta("perflow_delta.safetensors")
        ...     .with_attention({"self": "auto"})
        ...     .on("cuda")
        ... )
        >>> print(builder.describe())
        >>> pipe = builder.build()
        >>> images = pipe(prompt="a lighthouse at dusk", output="images")

    Args:
        components_manager: holds the components; None for a new one.
        collection: the manager's collection that they are put into, one of each name; None for none.
    """

    components_manager: ComponentsManager = field(default_factory=ComponentsManager)
    collection: str | None = None
    settings: BuilderSettings = field(default_factory=BuilderSettings, repr=False)

    def from_pretrained(
        self,
        location: PathLike,
        *,
        revision: str | None = None,
        variant: str | None = None,
        dtype: DtypeLike = "auto",
    ) -> PeRFlowPipelineBuilder:
        """Takes the components of a directory or repository in diffusers' layout, plain or modular.

        Args:
            location: directory, or repository of the Hub. Code that it brings is not run.
            revision: of the repository.
            variant: of its weight files, such as "fp16". Neither is for what an index names in other repositories.
            dtype: of all models. "auto": that of models which are given, else bfloat16 where the device computes in
                it, float16 on other accelerators, float32 on the CPU.
        """
        source = Repository(location=_text(location, "from_pretrained"), revision=revision, variant=variant)
        return self._with(repository=source, dtype=dtype)

    def from_single_file(
        self, path: PathLike, *, config: PathLike | None = None, dtype: DtypeLike = "auto"
    ) -> PeRFlowPipelineBuilder:
        """Takes UNet, VAE and text encoders of an original checkpoint, as fine-tunes are published.

        Args:
            path: a .safetensors file with the names of original checkpoints.
            config: directory or repository with a saved `StableDiffusionXLPipeline`, for the configurations, the
                tokenizers, the scheduler, and the models that the file lacks. With a directory nothing is fetched.
                None: a repository of the Hub, which diffusers infers from the weights.
            dtype: as for `from_pretrained`.
        """
        step = "from_single_file"
        source = SingleFile(path=_text(path, step), config=None if config is None else _text(config, step))
        return self._with(single_file=source, dtype=dtype)

    def with_component(
        self, name: str, component: Any, *, freeze: bool = False, **loading: str | None
    ) -> PeRFlowPipelineBuilder:
        """Puts a component in the place of the source's.

        Args:
            name: the pipeline's name for it, such as "unet" or "image_encoder".
            component: the object; a `ComponentSpec`; a directory or repository to load it from; or None to leave it
                out, and for guider and attention to have those that the blocks make. A list of ControlNets becomes a
                `MultiControlNetModel`.
            freeze: whether its weights take no gradients, as while something else is trained. Also sets those of an
                object that is given.
            loading: for a directory or repository: subfolder, variant, revision.
        """
        builder = self
        if name in ("guider", "attention"):
            if not isinstance(component, ComponentSpec) and not freeze and not loading:
                return self._with_own(name, component)
            builder = self._with_own(name, None)
        choice = ComponentChoice(value=component, freeze=freeze, loading=loading)
        return builder._with(components={**builder.settings.components, name: choice})

    def with_unet(self, unet: Any, *, freeze: bool = False, **loading: str | None) -> PeRFlowPipelineBuilder:
        """`with_component("unet", ...)`."""
        return self.with_component("unet", unet, freeze=freeze, **loading)

    def with_vae(self, vae: Any, *, freeze: bool = False, **loading: str | None) -> PeRFlowPipelineBuilder:
        """`with_component("vae", ...)`."""
        return self.with_component("vae", vae, freeze=freeze, **loading)

    def with_text_encoder(
        self, text_encoder: Any, *, tokenizer: Any = None, number: int = 1, freeze: bool = False, **loading: str | None
    ) -> PeRFlowPipelineBuilder:
        """`with_component("text_encoder", ...)`, or "text_encoder_2" with `number=2`, and its tokenizer."""
        suffix = "" if number == 1 else f"_{number}"
        builder = self.with_component(f"text_encoder{suffix}", text_encoder, freeze=freeze, **loading)
        return builder if tokenizer is None else builder.with_component(f"tokenizer{suffix}", tokenizer)

    def with_scheduler(self, scheduler: Any, **loading: str | None) -> PeRFlowPipelineBuilder:
        """`with_component("scheduler", ...)`. A `PeRFlowScheduler` is kept as it is, another one becomes one."""
        return self.with_component("scheduler", scheduler, freeze=False, **loading)

    def with_controlnet(
        self, controlnet: Any, *, freeze: bool = False, **loading: str | None
    ) -> PeRFlowPipelineBuilder:
        """`with_component("controlnet", ...)`: a ControlNet, a list of them, or a ControlNet-Union."""
        return self.with_component("controlnet", controlnet, freeze=freeze, **loading)

    def with_ip_adapter(
        self,
        location: PathLike,
        *,
        subfolder: str | None,
        weight_name: str | Sequence[str],
        scale: float = 1.0,
        image_encoder_folder: str | None = "image_encoder",
    ) -> PeRFlowPipelineBuilder:
        """Loads IP-Adapters and the image encoder beside them.

        Args:
            location: directory or repository.
            subfolder: of the weights in it, such as "sdxl_models"; None where they are at its top.
            weight_name: the file; a list for several adapters, in the order of the pictures of a call.
            scale: of the adapters.
            image_encoder_folder: where the image encoder is, below `subfolder` if it has no slash. None, or an encoder
                that `with_component("image_encoder", ...)` gives: it is not loaded.
        """
        names = (weight_name,) if isinstance(weight_name, str) else tuple(weight_name)
        adapter = IPAdapterChoice(
            location=_text(location, "with_ip_adapter"),
            subfolder=subfolder or "",
            weight_names=names,
            scale=scale,
            image_encoder_folder=image_encoder_folder,
        )
        return self._with(ip_adapter=adapter)

    def with_delta(self, path: PathLike, scale: float = 1.0, variant: str | None = None) -> PeRFlowPipelineBuilder:
        """Has every call merge a delta. The pipeline's configuration keeps all three, and so does a saved one.

        Args:
            path: a .safetensors file, an index of shards, or a folder of either.
            scale: its factor where a call names none.
            variant: which of several files in a folder, such as "fp16"; None for those without one.
        """
        resolved = Path(_text(path, "with_delta")).expanduser().resolve()
        return self._with(delta=DeltaChoice(path=str(resolved), scale=scale, variant=variant))

    def with_lora(
        self, location: PathLike, weight: float = 1.0, adapter_name: str | None = None, weight_name: str | None = None
    ) -> PeRFlowPipelineBuilder:
        """Loads a LoRA beside those of earlier steps.

        Args:
            location: file, directory or repository.
            weight: its factor.
            adapter_name: what peft calls it, without a dot; None for the name of the file or directory.
            weight_name: the file in a directory or repository; None for the usual one.
        """
        text = _text(location, "with_lora")
        name = adapter_name or re.sub(r"\W+", "_", Path(weight_name or text).stem)
        added = LoraChoice(adapter_name=name, location=text, weight=weight, weight_name=weight_name)
        kept = [
            lora
            for lora in self.settings.loras
            # Two files may have one name: that is for the user to decide.
            if lora.adapter_name != name
            or (adapter_name is None and (lora.location, lora.weight_name) != (text, weight_name))
        ]
        # By name, since sums are rounded: the order of calls says nothing.
        return self._with(loras=tuple(sorted((*kept, added), key=lambda lora: str(lora.adapter_name))))

    def with_guider(self, guider: Any) -> PeRFlowPipelineBuilder:
        """Sets the guider, one of `diffusers.guiders`; no recipe changes its scale."""
        return self._with_own("guider", guider)

    def with_guidance(self, scale: float, start: float = 0.0, stop: float = 1.0) -> PeRFlowPipelineBuilder:
        """Sets classifier-free guidance of this scale; `start` and `stop` are shares of the steps, in [0, 1]."""
        return self._with(guidance={"guidance_scale": scale, "start": start, "stop": stop})

    def with_attention(self, plan: PlanLike | AttentionConfig) -> PeRFlowPipelineBuilder:
        """Sets attention strategies: a plan as `AttentionConfig` takes it, or an `AttentionConfig`."""
        return self._with_own("attention", plan if isinstance(plan, AttentionConfig) else deepcopy(plan))

    def with_blocks(self, blocks: ModularPipelineBlocks | type[ModularPipelineBlocks]) -> PeRFlowPipelineBuilder:
        """Takes other blocks than `PeRFlowSDXLAutoBlocks`. They are copied; later changes have no effect."""
        return self._with(blocks=deepcopy(blocks))

    def with_workflow(self, name: str) -> PeRFlowPipelineBuilder:
        """Reduces the blocks to one workflow, such as "text2image", and the components to what it takes."""
        return self._with(workflow=name)

    def insert_block(
        self,
        name: str,
        block: ModularPipelineBlocks | type[ModularPipelineBlocks],
        *,
        before: str | None = None,
        after: str | None = None,
    ) -> PeRFlowPipelineBuilder:
        """Inserts a block next to another one; before the blocks are reduced to a workflow.

        Args:
            name: what it is called there.
            block: the block or its class. It is copied; later changes have no effect.
            before, after: the neighbour, one of the two: a block at the top ("decode"), one in the denoising loops
                ("solver": then it goes into every loop), one inside another ("denoise.input"), or another inserted
                one. No two blocks may ask for the same place.
        """
        insertion = Insertion(block=deepcopy(block), before=before, after=after)
        return self._with(insertions={**self.settings.insertions, name: insertion})

    def with_config(self, **values: Any) -> PeRFlowPipelineBuilder:
        """Sets configuration values of the pipeline, such as `num_time_windows=4`."""
        if isinstance(values.get("delta"), os.PathLike):
            values["delta"] = os.fspath(values["delta"])
        return self._with(config={**self.settings.config, **deepcopy(values)})

    def with_compile(self, **options: Any) -> PeRFlowPipelineBuilder:
        """Compiles the networks in place as `compile_loops` does, with its options."""
        return self._with(compile=options)

    def with_prompt_cache(self, max_entries: int = DEFAULT_MAX_ENTRIES) -> PeRFlowPipelineBuilder:
        """Encodes the same prompts once; the cache is `pipe.blocks.sub_blocks["text_encoder"]`."""
        return self._with(prompt_cache=max_entries)

    def offload(self, mode: OffloadMode | None) -> PeRFlowPipelineBuilder:
        """Keeps models on the CPU while they do not run.

        "auto": the manager moves whole models, all that it holds, as memory runs short. "group": the layers of each
        model come and go one by one, which takes the least memory and the most time. None: not at all.
        """
        return self._with(offload=mode)

    def on(self, device: str | int | torch.device | None) -> PeRFlowPipelineBuilder:
        """Has the models run on this device; None for the CPU, and with `offload` for the accelerator there is."""
        return self._with(device=device)

    def problems(self) -> list[str]:
        """All that is wrong with what would be built, a sentence each; loads nothing."""
        return list(make_plan(self.settings, self.components_manager).problems)

    def describe(self) -> str:
        """What would be built, and what is wrong with it, as text to print; loads nothing."""
        return describe(make_plan(self.settings, self.components_manager))

    def build(self) -> ModularPipeline:
        """The pipeline with its components loaded.

        Raises:
            ValueError: all mistakes at once, before anything is loaded; or all components that could not be loaded
                after all, or the adapter that could not, and then none of them is in the manager or in a given model.
        """
        plan = make_plan(self.settings, self.components_manager)
        if plan.problems:
            raise ValueError(complaint("built", list(plan.problems)))
        return build_pipeline(plan, self.components_manager, self.collection)

    def build_components(self) -> dict[str, Any]:
        """The components of the pipeline by name, for pipelines of another kind; those left out are not there.

        The delta is merged already. The scheduler is as the source has it: `PeRFlowScheduler.from_scheduler` makes one
        for PeRFlow. An attention plan is for `components["attention"].attach({"unet": components["unet"]})`.

        Raises:
            ValueError: as for `build`, or a delta that cannot be merged.
        """
        pipe = self.build()
        merge_now(pipe)
        return {name: component for name, component in pipe.components.items() if component is not None}

    def _with_own(self, name: str, value: Any) -> PeRFlowPipelineBuilder:
        """With the guider or attention given as such, and no longer as a component."""
        others = {other: choice for other, choice in self.settings.components.items() if other != name}
        return self._with(components=others, **{name: value})

    def _with(self, **changes: Any) -> PeRFlowPipelineBuilder:
        return replace(self, settings=replace(self.settings, **changes))


def _text(location: PathLike, step: str) -> str:
    """A location as text; an existing directory or file by its whole path."""
    if not isinstance(location, (str, os.PathLike)):
        raise ValueError(f"{step}: {location!r} is no path; pass a file, a directory or a repository of the Hub.")
    path = Path(location).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(location)
