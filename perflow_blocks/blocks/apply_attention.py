"""Puts the attention plan into effect on UNet and ControlNets, before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState

from ..attention.config import AttentionConfig, parse_plan
from ..delta.model_lock import model_lock
from .declare import declared
from .specs import attention_config_specs, attention_spec, unet_spec


class PeRFlowApplyAttentionStep(ModularPipelineBlocks):
    """Gives every attention module of UNet and ControlNets the strategy that the plan asks for.

    Which plan: that of an `AttentionConfig` set as the component `attention` and not run before, else the
    configuration's `attention_plan`. The first is written to the configuration, so that a save keeps it. What was set
    last counts, whichever of the two it is. Without a plan, what an earlier one attached is taken out.

    Runs at every call, since IP-Adapters and fused projections bring new processors; where nothing changed, it changes
    nothing.

    Raises:
        ImportError: a strategy's package is missing or too old.
        ValueError: a plan of the wrong form; an unknown strategy, or one that does not run here; a pattern that
            matches no module; an `attention` that is not an AttentionConfig.
    """

    model_name = "stable-diffusion-xl"
    description = (
        "Puts the attention plan into effect: strategies such as `sage` or `sliced`, by kind and name of module.\n"
        "To set one: pipe.update_components(attention=AttentionConfig({...})). What ran: pipe.attention.report()."
    )
    expected_components = declared(attention_spec(), unet_spec())
    expected_configs = declared(*attention_config_specs())

    @torch.no_grad()
    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        with model_lock(components.unet):
            self._apply(components)
        return components, state

    def _apply(self, components: Any) -> None:
        attention = components.attention
        if not isinstance(attention, AttentionConfig):
            # One of the installed package, or of another self-contained workflow, brings its plan.
            if AttentionConfig.__name__ not in [kind.__name__ for kind in type(attention).__mro__]:
                raise ValueError(f"attention={attention!r} must be an AttentionConfig, such as AttentionConfig().")
            attention = AttentionConfig(attention.config.plan)
            components.update_components(attention=attention)
        is_new = attention.is_new_to(components)
        plan = attention.config.plan if is_new else components.config.attention_plan
        loaded = components.components
        models = {name: loaded[name] for name in ("unet", "controlnet") if loaded.get(name) is not None}
        attention.establish(parse_plan(plan), models, device=lambda: components._execution_device)
        if is_new:
            components.update_components(attention_plan=plan)
            attention.remember(components)
