"""The component `attention`: puts a plan into effect on models, says what ran, and takes it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers import ConfigMixin
from diffusers.models import MultiControlNetModel
from diffusers.models.attention_processor import Attention
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from torch import nn

from .plan import AttentionKind, AttentionPlace, AttentionPlan, PlanLike, parse_plan
from .processor import PROCESSORS, StrategyAttnProcessor, plain_processor, why_kept
from .registry import get_attention_strategy
from .report import AttentionRecord, AttentionReport, make_report
from .strategy import AttentionStrategy

IMAGE_PROJECTION = "encoder_hid_proj"
"""What projects an IP-Adapter's pictures, which is no attention of the denoiser."""

_LOAD_ID = "_diffusers_load_id"
"""Where `ComponentSpec.create` marks what a pipeline made by itself."""


class AttentionConfig(ConfigMixin):
    """Which attention strategy each attention module of UNet and ControlNets uses.

    A plan is a strategy's name, for all modules (`"sliced"`); or a mapping of kinds (`"self"`, `"cross"`) and patterns
    of module names to strategies' names; or the same as a list of "key=name" strings. Kinds say the default, patterns
    overrule them, and of several patterns the last one wins. A pattern is a glob such as "up_blocks.*.attn1", with or
    without the component in front ("unet.mid_block.*", "controlnet.*"). Modules that a plan does not speak of are left
    as they are; so are those whose processor is not diffusers' plain one, such as an IP-Adapter's.

    Diffusers' `set_default_attn_processor` refuses processors that it does not know: call `detach` before it.

    A pipeline with `PeRFlowApplyAttentionStep` puts the plan into effect at every call, as in the example. `attach`
    does it for models outside such a pipeline.

    Example:
        >>> pipe.update_components(attention=AttentionConfig({"self": "sliced", "cross": "native"}))
        >>> images = pipe(prompt="a red star", output="images")
        >>> print(pipe.attention.report())

    Args:
        plan: the plan; None for none.

    Raises:
        ValueError: a plan of another form; a key that is neither kind nor pattern; a strategy that is not registered.
    """

    config_name = "attention_config.json"
    # There are no weights to load: without this mark on those that users make, update_components warns.
    _diffusers_load_id: str = "null"

    def __init__(self, plan: PlanLike | None = None) -> None:
        self._plan = parse_plan(plan)
        self.register_to_config(plan=None if self._plan is None else self._plan.as_list())
        self._records: WeakKeyDictionary[Attention, AttentionRecord] = WeakKeyDictionary()
        self._models: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether each was compiled as a whole
        self._taken: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by pipeline: the setting that it has run with
        self._found_fit: set[tuple[AttentionStrategy, torch.device, torch.dtype, int]] = set()
        self._told: set[tuple[str, str]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the plan, and has attached and counted nothing."""
        made_by_pipeline = {_LOAD_ID: vars(self)[_LOAD_ID]} if _LOAD_ID in vars(self) else None
        return type(self), (self.config.plan,), made_by_pipeline

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.plan})"

    def attach(self, models: Mapping[str, nn.Module], *, device: torch.device | str | None = None) -> None:
        """Puts the plan into effect.

        Args:
            models: models by the component's name, `{"unet": unet}`. A `MultiControlNetModel` stands for its models.
            device: where they will run; None for where each is.

        Raises:
            ImportError: a strategy's package is missing or too old.
            ValueError: a strategy does not run here; a pattern that means no attention module; a model without values
                (device "meta") and no device. Then no module is changed.
        """
        self.establish(self._plan, models, device=device)

    def establish(
        self, plan: AttentionPlan | None, models: Mapping[str, nn.Module], *, device: torch.device | str | None = None
    ) -> None:
        """As `attach`, with a plan in place of the component's own; None takes out what any plan has attached."""
        given = None if device is None else torch.device(device)
        sites = list(_sites(models))
        if plan is not None:
            plan.require_places([site.place for site in sites], models)
        # Once for each model, since both look through all weights.
        run_as = cache(lambda model: (_device_of(model) if given is None else given, model.dtype))
        changes = [self._change(plan, site, run_as) for site in sites]
        for site, change in zip(sites, changes, strict=True):
            self._apply(site, *change)
        for model, compiled in _single_models(models).values():
            self._models[model] = compiled
            _restore_spares(model)

    def detach(self) -> None:
        """Gives all modules of the models that this component has seen the processors back that they had.

        A pipeline whose configuration names a plan attaches again at its next call; `update_components(
        attention_plan=None)` ends that.
        """
        for attn in self._records:
            _set_processor(attn, plain_processor(attn.processor))
        for model in self._models:
            _restore_spares(model)

    def report(self) -> AttentionReport:
        """What each attention module was asked to run and ran, since the last `reset`; `print` shows a table."""
        compiled = {part for model, whole in self._models.items() for part in _compiled_parts(model, whole)}
        return make_report((record, attn in compiled) for attn, record in self._records.items())

    def reset(self) -> None:
        """Sets all counters to zero."""
        for record in self._records.values():
            record.reset()

    def is_new_to(self, pipeline: Any) -> bool:
        """Whether the pipeline has not been run since this component was set, and so not with its plan.

        A component that a pipeline made by itself, without a plan, brings none.
        """
        made_by_pipeline = _LOAD_ID in vars(self)  # set by ComponentSpec.create
        return self._taken.get(pipeline) is not _setting(pipeline) and not (made_by_pipeline and self._plan is None)

    def remember(self, pipeline: Any) -> None:
        """Notes that the pipeline has taken the plan into its own configuration, which says what runs from now on."""
        self._taken[pipeline] = _setting(pipeline)

    def _change(
        self, plan: AttentionPlan | None, site: _Site, run_as: Callable[[Any], tuple[torch.device, torch.dtype]]
    ) -> tuple[str | None, str | None, AttentionStrategy | None]:
        """What the plan asks for at a module, why that is not done, and the strategy to use."""
        asked = None if plan is None else plan.strategy_for(site.place)
        if asked is None:
            return None, None, None
        strategy, kept = get_attention_strategy(asked), why_kept(site.attn)
        if kept is not None:
            return asked, kept, None
        call = (*run_as(site.model), site.attn.inner_dim // site.attn.heads)
        if (strategy, *call) not in self._found_fit:
            strategy.require(*call)
            self._found_fit.add((strategy, *call))
        return asked, None, strategy

    def _apply(self, site: _Site, asked: str | None, kept: str | None, strategy: AttentionStrategy | None) -> None:
        current = site.attn.processor
        if site.attn not in self._records:
            # What another component's processor was compiled into is run again where nothing else changes.
            traced = current.record.traced if isinstance(current, StrategyAttnProcessor) else ()
            self._records[site.attn] = AttentionRecord(told=self._told, traced=set(traced))
        record = self._records[site.attn]
        record.place, record.asked, record.kept = site.place, asked, kept
        plain = plain_processor(current)
        if strategy is None:
            _set_processor(site.attn, plain)
        elif not _calls(current, strategy, record):
            _set_processor(site.attn, PROCESSORS[type(plain)](strategy, plain, record))


def _device_of(model: Any) -> torch.device:
    if model.device.type == "meta":
        raise ValueError(
            f"{type(model).__name__} holds no values (device 'meta'), so where it will run is not known; pass device=."
        )
    return model.device


def _setting(pipeline: Any) -> Any:
    """What `update_components(attention=...)` makes anew each time, also for a component that was set before."""
    return pipeline._component_specs["attention"]


class _Site(NamedTuple):
    """An attention module, the model it is part of, and where it stands."""

    attn: Attention
    model: Any
    place: AttentionPlace


def _sites(models: Mapping[str, nn.Module]) -> Iterator[_Site]:
    """All attention modules of the denoising models, in their order."""
    seen: set[Attention] = set()  # one ControlNet may stand in several places
    for label, (model, _) in _single_models(models).items():
        for path, attn in model.named_modules():
            name = path.replace("_orig_mod.", "")  # of a part that was compiled
            if isinstance(attn, Attention) and attn not in seen and not name.startswith(IMAGE_PROJECTION):
                seen.add(attn)
                kind: AttentionKind = "cross" if attn.is_cross_attention else "self"
                place = AttentionPlace(component=label.split(".")[0], model=label, name=name, kind=kind)
                yield _Site(attn, model, place)


def _single_models(models: Mapping[str, nn.Module]) -> dict[str, tuple[Any, bool]]:
    """The models by their labels, several ControlNets one by one; each with whether `torch.compile` wrapped it."""
    single: dict[str, tuple[Any, bool]] = {}
    for component, given in models.items():
        model = unwrap_module(given)
        parts = {component: given}
        if isinstance(model, MultiControlNetModel):
            parts = {f"{component}.nets.{number}": part for number, part in enumerate(model.nets)}
        for label, part in parts.items():
            single[label] = (unwrap_module(part), is_compiled_module(part) or is_compiled_module(given))
    return single


def _compiled_parts(model: nn.Module, whole: bool) -> Iterator[nn.Module]:
    """The modules that run inside compiled code."""
    for module in model.modules():
        if whole or is_compiled_module(module) or module._compiled_call_impl is not None:  # set by module.compile()
            yield from module.modules()


def _calls(processor: Any, strategy: AttentionStrategy, record: AttentionRecord) -> bool:
    """Whether a module's processor is one that calls this strategy and counts here."""
    return (
        isinstance(processor, StrategyAttnProcessor) and processor.strategy is strategy and processor.record is record
    )


def _set_processor(attn: Attention, processor: Any) -> None:
    if attn.processor is not processor:
        attn.set_processor(processor)


def _restore_spares(model: nn.Module) -> None:
    """Restores the processors that diffusers put aside when it fused projections, and will put back."""
    spares = vars(model).get("original_attn_processors") or {}
    for name, processor in spares.items():
        spares[name] = plain_processor(processor)
