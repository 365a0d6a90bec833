"""The component `attention`: plans, attaching them to models and detaching them, and the report of what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from diffusers import ConfigMixin
from diffusers.models import MultiControlNetModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.utils.torch_utils import is_compiled_module, unwrap_module
from torch import nn

from .processor import PLAIN, AttentionRecord, StrategyAttnProcessor
from .strategies import AttentionStrategy, get_attention_strategy

KINDS = ("self", "cross")
"""What an attention module sees: the image itself, or the prompt."""

PlanLike = str | Mapping[str, str] | Sequence[str]
"""A strategy's name, for all modules; or kinds and patterns with a name each, as a mapping or "key=name" strings."""

Device = Callable[[], torch.device] | None
"""Gives the device where models will run. Called as rarely as can be: pipelines look through all modules for it."""


class AttentionPlace(NamedTuple):
    """An attention module `attn` of a `model`, and where it is."""

    label: str  # the pipeline's name for the model, with its number where there are several: "controlnet.nets.0"
    name: str  # in the model, such as "mid_block.attentions.0.transformer_blocks.0.attn1"
    kind: str
    attn: Any = None
    model: Any = None
    compiled: bool = False  # whether `torch.compile` wrapped the model

    @property
    def full_name(self) -> str:
        return f"{self.label}.{self.name}"

    def matches(self, pattern: str) -> bool:
        """Whether a glob matches the name, alone or with model or component in front; `*` stands for dots too."""
        names = (self.name, self.full_name, f"{self.label.split('.')[0]}.{self.name}")
        return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class AttentionPlan:
    """Kinds and patterns with the strategy asked for. Patterns overrule kinds, and the last pattern wins."""

    entries: dict[str, str]

    def asks(self, place: AttentionPlace) -> str | None:
        """The name of the strategy that a module is asked to use; None if the plan says nothing of it."""
        for pattern, name in reversed(self.entries.items()):
            if pattern not in KINDS and place.matches(pattern):
                return name
        return self.entries.get(place.kind)

    def as_list(self) -> list[str]:
        """The plan as "key=name" strings, as an index holds it: JSON need not keep the order of a mapping."""
        return [f"{key}={name}" for key, name in self.entries.items()]

    def check(self, places: Sequence[AttentionPlace], components: Iterable[str]) -> None:
        """Raises a ValueError for a pattern that matches no module, unless it is about a component not in use now."""
        absent = tuple({"unet", "controlnet"} - set(components))
        for pattern in self.entries:
            known = pattern in KINDS or pattern.startswith(absent)
            if not known and not any(place.matches(pattern) for place in places):
                examples = " or ".join(repr(place.full_name) for place in places[:2])
                allowed = f"'self', 'cross' or a module's name such as {examples}"
                raise ValueError(f"attention plan: {pattern!r} matches no attention module; pass {allowed}.")


def parse_plan(plan: PlanLike | None) -> AttentionPlan | None:
    """The plan; None if nothing is asked for.

    Raises:
        ValueError: another type, or an unknown strategy.
    """
    entries: Any = plan or {}
    if isinstance(plan, str):
        entries = dict.fromkeys(KINDS, plan)
    elif isinstance(plan, Sequence) and all(isinstance(entry, str) and "=" in entry for entry in plan):
        entries = {key.strip(): name.strip() for key, _, name in (entry.rpartition("=") for entry in plan)}
    if not isinstance(entries, Mapping):
        forms = 'a mapping such as {"self": "sliced", "mid_block.*": "native"}, or a list such as ["self=sliced"]'
        raise ValueError(f"attention plan={plan!r} must be a strategy's name, {forms}.")
    for name in entries.values():
        get_attention_strategy(name)
    ordered = sorted(entries.items(), key=lambda entry: entry[0] not in KINDS)
    return AttentionPlan(dict(ordered)) if entries else None


@dataclass(frozen=True)
class AttentionReport:
    """What each attention module was asked to run and ran; `str()` gives a table, one line for modules that are alike.

    `rows` has an entry for each module, in the models' order.
    """

    rows: tuple[AttentionRecord, ...]

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.module.split(".")[0], *row.cells()), []).append(row.module)
        lines = [("module", "kind", "asked for", "ran", "why")]
        for (_, kind, asked, ran, why), modules in groups.items():
            name = modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} like it"
            lines.append((name, kind, asked, ran, why))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class AttentionConfig(ConfigMixin):
    """Which attention strategy each attention module of UNet and ControlNets uses.

    A plan is a strategy's name, for all modules (`"sliced"`); or a mapping of kinds (`"self"`, `"cross"`) and patterns
    of module names to strategies' names; or the same as a list of "key=name" strings; or None. Patterns
    overrule kinds, and the last pattern wins. A pattern is a glob such as "up_blocks.*.attn1", with or without the
    component in front ("unet.mid_block.*", "controlnet.*"). Modules that a plan says nothing of stay as they are, and
    so do those whose processor is not diffusers' plain one, such as an IP-Adapter's.

    A pipeline with `PeRFlowApplyAttentionStep` puts the plan into effect at every call, as in the example. `attach`
    does it for models outside such a pipeline. Call `detach` before diffusers' `set_default_attn_processor`, which
    refuses processors that it does not know.

    Example:
        >>> pipe.update_components(attention=AttentionConfig({"self": "sliced", "cross": "native"}))
        >>> images = pipe(prompt="a red star", output="images")
        >>> print(pipe.attention.report())

    Raises:
        ValueError: a plan of another form, or an unknown strategy.
    """

    config_name = "attention_config.json"
    # There are no weights to load: without this mark on those that users make, update_components warns. On those that
    # a pipeline makes by itself, ComponentSpec.create sets it.
    _diffusers_load_id: str = "null"

    def __init__(self, plan: PlanLike | None = None) -> None:
        self._plan = parse_plan(plan)
        self.register_to_config(plan=None if self._plan is None else self._plan.as_list())
        self._records: WeakKeyDictionary[Attention, AttentionRecord] = WeakKeyDictionary()
        self._models: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether each was compiled as a whole
        self._taken: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by pipeline: the setting that it has run with
        self._resolved: dict[tuple[Any, ...], AttentionStrategy] = {}
        self._told: set[tuple[str, str]] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy has the plan, and has attached and counted nothing."""
        made_by_pipeline = {key: value for key, value in vars(self).items() if key == "_diffusers_load_id"}
        return type(self), (self.config.plan,), made_by_pipeline or None

    def attach(self, models: Mapping[str, nn.Module], *, device: torch.device | str | None = None) -> None:
        """Puts the plan into effect.

        Args:
            models: models by the component's name, `{"unet": unet}`. A `MultiControlNetModel` stands for its models.
            device: where they will run; None for where each is.

        Raises:
            ImportError: a strategy's package is missing or too old.
            ValueError: a strategy does not run here, or a pattern matches no attention module. No module is changed.
        """
        self._resolved.clear()  # strategies that run on one device need not run on another
        self.establish(self._plan, models, None if device is None else lambda: torch.device(device))

    def establish(self, plan: AttentionPlan | None, models: Mapping[str, nn.Module], device: Device = None) -> None:
        """Puts any plan into effect, as `attach` does with this one's. None takes out what is attached."""
        places = list(_places(models))
        if plan is not None:
            plan.check(places, models)
        changes = [self._change(plan, place, device) for place in places]
        for place, (asked, kept, strategy) in zip(places, changes, strict=True):
            record = self._records.setdefault(place.attn, AttentionRecord(told=self._told))
            record.module, record.kind, record.asked, record.kept = place.full_name, place.kind, asked, kept
            _set_processor(place.attn, strategy, record)
            self._models[place.model] = place.compiled
        _restore_spares({place.model for place in places})

    def detach(self) -> None:
        """Gives all modules that this component has changed the processors back that they had.

        A pipeline attaches again at its next call, unless `update_components(attention_plan=None)` ends that.
        """
        for attn in self._records:
            _set_processor(attn, None)
        _restore_spares(self._models)

    def report(self) -> AttentionReport:
        """What each attention module was asked to run and ran, since the last `reset`; `print` shows a table."""
        compiled = set[nn.Module]()
        for model, whole in self._models.items():
            for module in model.modules():
                if whole or is_compiled_module(module) or module._compiled_call_impl is not None:  # module.compile()
                    compiled.update(module.modules())
        records = self._records.items()
        rows = (replace(record, counts=record.counts.copy(), compiled=attn in compiled) for attn, record in records)
        return AttentionReport(tuple(rows))

    def reset(self) -> None:
        """Sets all counters to zero."""
        for record in self._records.values():
            record.counts.clear()

    def is_new_to(self, pipeline: Any) -> bool:
        """Whether the pipeline has not been run since this component was set, and so not with its plan.

        A component that a pipeline made by itself, without a plan, brings none.
        """
        is_taken = self._taken.get(pipeline) is pipeline._component_specs["attention"]
        return not is_taken and not ("_diffusers_load_id" in vars(self) and self._plan is None)

    def remember(self, pipeline: Any) -> None:
        """Notes that the pipeline has taken the plan into its own configuration, which says what runs from now on."""
        self._taken[pipeline] = pipeline._component_specs["attention"]  # update_components makes a new one each time

    def _change(
        self, plan: AttentionPlan | None, place: AttentionPlace, device: Device
    ) -> tuple[str | None, str | None, AttentionStrategy | None]:
        """What the plan asks for at a module, why that is not done, and the strategy to use."""
        attn, model = place.attn, place.model
        asked = None if plan is None else plan.asks(place)
        if asked is None:
            return None, None, None
        processor = type(_plain(attn.processor))
        if processor not in PLAIN:  # one of a user's own, or an IP-Adapter's
            return asked, processor.__name__, None
        weight, head_dim = next(attn.parameters()), attn.inner_dim // attn.heads
        key = (asked, weight.device, weight.dtype, head_dim)
        if key not in self._resolved:
            runs_on = model.device if device is None else device()
            if runs_on.type == "meta":
                raise ValueError(f"{type(model).__name__} is on device 'meta': pass device=, where it will run.")
            self._resolved[key] = get_attention_strategy(asked).resolve(runs_on, model.dtype, head_dim)
        return asked, None, self._resolved[key]


def _places(models: Mapping[str, nn.Module]) -> Iterator[AttentionPlace]:
    """All attention modules of transformer blocks, in the models' order, several ControlNets one by one.

    Others do more than project and attend, or belong to an IP-Adapter's image projection.
    """
    seen: set[Attention] = set()  # one ControlNet may stand in several places
    for component, given in models.items():
        parts = {component: given}
        if isinstance(several := unwrap_module(given), MultiControlNetModel):
            parts = {f"{component}.nets.{number}": net for number, net in enumerate(several.nets)}
        for label, part in parts.items():
            model, compiled = unwrap_module(part), is_compiled_module(part) or is_compiled_module(given)
            for path, block in model.named_modules():
                if not isinstance(block, BasicTransformerBlock):
                    continue
                for own in ("attn1", "attn2"):
                    attn = getattr(block, own)
                    if attn is not None and attn not in seen:
                        seen.add(attn)
                        name = f"{path}.{own}".replace("_orig_mod.", "")  # of a part that was compiled
                        kind = "cross" if attn.is_cross_attention else "self"
                        yield AttentionPlace(label, name, kind, attn, model, compiled)


def _plain(processor: Any) -> Any:
    """What a processor of this package replaced; any other one as it is."""
    return processor.replaced if isinstance(processor, StrategyAttnProcessor) else processor


def _set_processor(attn: Attention, strategy: AttentionStrategy | None, record: AttentionRecord | None = None) -> None:
    """Has a module call a strategy; None gives it back the processor that it had. Keeps what is right already."""
    current, plain = attn.processor, _plain(attn.processor)
    if strategy is None:
        if current is not plain:
            attn.set_processor(plain)
    elif current is plain or current.strategy is not strategy or current.record is not record:
        attn.set_processor(StrategyAttnProcessor(strategy, plain, record))


def _restore_spares(models: Iterable[nn.Module]) -> None:
    """Restores the processors that diffusers put aside when it fused projections, and will put back."""
    for model in models:
        spares = vars(model).get("original_attn_processors") or {}
        spares.update({name: _plain(processor) for name, processor in spares.items()})
